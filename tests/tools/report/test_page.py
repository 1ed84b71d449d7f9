"""The page: whole, escaped, small, and closed to everything but its own script."""

from __future__ import annotations

import base64
import hashlib
import re
from html import unescape
from pathlib import Path

import pytest

from cantata.tools.report.page import page
from cantata.tools.report.run import read_runs
from tests.tools.report.runs import EVIL, make_run, record, write_lines
from tests.tools.test_inspect_html import Balanced


def made(*paths: Path) -> tuple[str, Balanced]:
    text = page(read_runs(paths))
    return text, Balanced(text)


def test_every_text_is_escaped_and_every_tag_closed(tmp_path: Path) -> None:
    text, parsed = made(
        make_run(tmp_path / f"run {EVIL.replace('/', '-')}"), make_run(tmp_path / "b", seed=2)
    )
    assert parsed.tags.count("script") == text.count("<script") == 1
    assert "onerror=alert(1)>" not in text
    assert "{{ 7 * 7 }}" in parsed.text
    for words in (f"look out {EVIL}", f"cantata pretrain: {EVIL}", f"from weights {EVIL}", f"emoji:{EVIL}"):
        assert words in parsed.text
    assert "a cat\\u202e" in parsed.text, "nothing reorders the page"
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(", text)


def test_only_its_own_script_may_run(tmp_path: Path) -> None:
    text, _ = made(make_run(tmp_path / "run"))
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'content="(default-src[^"]*)"', text)
    assert unescape(policy) == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def test_several_runs_are_told_by_what_differs(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=2)
    text, parsed = made(one, two)
    shown = " ".join(parsed.text.split())
    assert "2 runs side by side" in shown
    assert "1 key of the configuration" in shown
    assert "<tr><td>seed</td><td>1</td><td>2</td></tr>" in text
    assert "equal" in " ".join(made(one, make_run(tmp_path / "three"))[1].text.split())


@pytest.mark.parametrize("rows", [[], [record(1, 2.0)], [record(1, None)]])
def test_a_run_that_came_to_nothing_has_a_page(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("name: bare\n")
    write_lines(path / "metrics.jsonl", rows)
    _, parsed = made(path)
    assert "unknown" in parsed.text
    assert ("No values yet." in parsed.text) == (not rows)
    assert ("holds no step yet" in parsed.text) == (not rows)


def test_a_failure_and_all_that_is_wrong_stand_at_the_top(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    history = path / "logs" / "history.jsonl"
    history.write_text(
        history.read_text().replace('"outcome": "done"', '"outcome": "failed", "error": "step 13: bang"')
    )
    rows = [record(1, 2.0), record(2, None), record(3, 1.0), record(3, 1.5)]
    write_lines(path / "metrics.jsonl", rows)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    _, parsed = made(path)
    top = parsed.text[: parsed.text.index("Over steps.")]
    for words in (
        "Why run failed",
        "step 13: bang",
        "1 line broken and left out, the last one cut short",
        "step 3 and what follows were logged again after a resume: 1 line of before replaced",
        "loss: no finite value 1 times, gaps in its chart",
        "never known: mfu",
    ):
        assert words in top
    assert "resumed from step 2" in parsed.text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    write_lines(path / "metrics.jsonl", [record(step, 8.0 / step) for step in range(1, 20_001)])
    text, parsed = made(path)
    assert len(text) < 400_000
    assert "20,000 lines are thinned" in parsed.text
