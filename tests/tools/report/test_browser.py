"""The page in a real browser: it opens in silence, draws, fits, and answers pointer and keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cantata.tools.report.command import write_report
from tests.system_tools import need
from tests.tools.report.browser import Browser
from tests.tools.report.runs import EVIL, make_run, record, write_lines

WIDTHS = (1280, 400)
OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; });"
WEAKEST_TEXT, WEAKEST_LINE = 4.5, 3.0
"""Contrast that WCAG AA asks of texts and of graphics."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need("chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that resumed, with a gap, a hostile name and two intervals of expert load."""
    path = make_run(tmp_path_factory.mktemp("one") / f"run {EVIL.replace('/', '-')}", steps=100)
    rows = [record(step, None if step == 50 else 8.0 / step) for step in range(1, 101)]
    rows[0]["eval/initial/loss"], rows[59]["eval/loss"], rows[99]["eval/loss"] = 9.0, 4.0, 2.5
    write_lines(path / "metrics.jsonl", [*rows[:70], *rows[60:]])
    return write_report([path])[1]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    paths = [make_run(folder / f"a_run_with_a_rather_long_name_{seed}", seed=seed) for seed in range(3)]
    return write_report(paths, folder / "report.html")[1]


def test_it_opens_in_silence_and_draws_every_chart(browser: Browser, one: Path) -> None:
    browser.open(one)
    assert browser.requests == []
    assert browser.complaints == []
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelectorAll('.chart').length") == 13
    browser.run(OPEN_ALL)
    flat = (
        "[...document.querySelectorAll('.line[data-points]')].filter((line) => line.getBBox().width < 1000)"
    )
    assert browser.run(f"{flat}.length") == 0
    assert browser.run("document.querySelectorAll('.wide .resume').length") == 1
    broken = "[...document.images].filter((image) => !image.complete || image.naturalWidth === 0)"
    assert browser.run(f"{broken}.length") == 0
    assert browser.complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_no_mark_lies_on_another(browser: Browser, one: Path, several: Path, width: int) -> None:
    for page in (one, several):
        browser.open(page, width)
        browser.run(OPEN_ALL)
        too_wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.run(too_wide) == 0
        overlapping = """
            const found = [];
            for (const plot of document.querySelectorAll('.plot')) {
              for (const kind of ['.x', '.y']) {
                const boxes = [...plot.querySelectorAll(kind)].map((mark) => mark.getBoundingClientRect());
                for (let i = 1; i < boxes.length; i++) {
                  const [a, b] = [boxes[i - 1], boxes[i]];
                  if (kind === '.x' ? a.right > b.left : a.top < b.bottom) found.push(plot.ariaLabel);
                }
                if (boxes.some((box) => box.left < 0 || box.right > innerWidth)) found.push(plot.ariaLabel);
              }
            }
            return found;
        """
        assert browser.run(overlapping) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_moves_under_the_pointer(browser: Browser, several: Path, width: int) -> None:
    browser.open(several, width)
    browser.run(OPEN_ALL)
    moved = """
        const plots = [...document.querySelectorAll('.plot')];
        const look = () => plots.map((plot) => plot.offsetTop);
        const before = look(), found = [];
        for (const plot of plots) {
          const box = plot.getBoundingClientRect();
          for (const place of [0, 0.35, 0.8, 1]) {
            const clientX = box.left + place * box.width;
            plot.dispatchEvent(new PointerEvent('pointermove', { clientX }));
            look().forEach((top, index) => { if (top !== before[index]) found.push(plot.ariaLabel); });
          }
        }
        return found;
    """
    assert browser.run(moved) == []


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(...)` (WCAG 2.1)."""
    shares = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_dark_and_light_are_both_readable(browser: Browser, several: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        browser.open(several, scheme=scheme)
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        card = browser.run("getComputedStyle(document.querySelector('.chart')).backgroundColor")
        texts = browser.run(
            "return ['h1', '.soft', '.note', 'a', '.is-finished', '.remark', '.right', '.y'].map("
            "(name) => getComputedStyle(document.querySelector(name)).color);"
        )
        lines = browser.run(
            "return [...document.querySelectorAll('.wide .line[data-points]')].map("
            "(line) => getComputedStyle(line).stroke);"
        )
        assert min(contrast(text, ground) for text in texts) >= WEAKEST_TEXT
        assert len(set(lines)) == 3
        assert min(contrast(line, card) for line in lines) >= WEAKEST_LINE
        grounds.append(ground)
    assert luminance(grounds[0]) > 0.8
    assert luminance(grounds[1]) < 0.05


def test_values_are_told_to_pointer_and_keys(browser: Browser, one: Path) -> None:
    browser.open(one)
    browser.run("window.plot = document.querySelector('.wide .plot'); plot.focus();")
    shown = (
        "return [document.querySelector('.wide .at').textContent, "
        "...[...document.querySelectorAll('.wide .key output')].map((output) => output.value)];"
    )
    at_rest = browser.run(shown)
    assert at_rest == ["", "0.08", "0.08165", "2.5"]

    def press(key: str) -> list[str]:
        browser.run(f"plot.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}' }}));")
        told: list[str] = browser.run(shown)
        return told

    assert press("ArrowLeft")[:2] == ["step 100", "0.08"]
    assert press("ArrowLeft")[0] == "step 99"
    assert press("Home")[::3] == ["step 0", "9"]
    assert press("Escape") == at_rest
    browser.run(
        "const box = plot.getBoundingClientRect(); plot.dispatchEvent("
        "new PointerEvent('pointermove', { clientX: box.left + 0.5 * box.width }));"
    )
    assert browser.run(shown)[:2] == ["step 50", "-"]
    browser.run("plot.dispatchEvent(new PointerEvent('pointerleave'));")
    assert browser.run(shown) == at_rest
    assert browser.complaints == []


def test_intervals_are_leafed_through(browser: Browser, one: Path) -> None:
    browser.open(one)
    look = (
        "const map = document.querySelector('.map'), frames = [...map.querySelectorAll('.film img')];"
        "return [document.querySelector('.steps').value, "
        "frames.map((frame) => frame.src === map.querySelector('.large').src), "
        "frames.map((frame) => frame.classList.contains('chosen'))];"
    )
    assert browser.run(look)[::2] == ["steps 51 to 100: 1 of 24 experts dead", [False, True]]
    browser.run(
        "const slider = document.querySelector('.slider input'); slider.value = 0;"
        "slider.dispatchEvent(new Event('input'));"
    )
    assert browser.run(look)[::2] == ["steps 1 to 50: 1 of 24 experts dead", [True, False]]
    cell = browser.run(
        "const large = document.querySelector('.large'), box = large.getBoundingClientRect();"
        "return [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [7.5, 2.5]].map(([x, y]) => {"
        "  large.dispatchEvent(new PointerEvent('pointermove', "
        "    { clientX: box.left + x / 8 * box.width, clientY: box.top + y / 3 * box.height }));"
        "  return document.querySelector('.cell').value; });"
    )
    assert cell == [
        "layer 0, expert 0: dead",
        "layer 0, expert 1: no token",
        "layer 0, expert 2: 1.33 of the ideal",
        "layer 2, expert 7: 1.00 of the ideal",
    ]
