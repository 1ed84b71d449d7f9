"""`cantata generate`: what it writes where, and what it refuses before weights are read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cantata import cli
from cantata.infer.generate import generate
from cantata.tools import generate as tool
from cantata.tools.open_model import load, open_model
from cantata.tools.prompts import Prompt, encode
from tests.tools.test_export import make_run

STATS = (
    r"\d+ prompt tokens, (\d+) new tokens in [\d.]+ s \([\d.]+ tokens/s\); (\d) of (\d) cut at the limit\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "run")
    Image.new("RGB", (70, 70), "red").save(folder / "red.png")
    assert cli.main(["export", str(folder / "run"), "--to", str(folder / "hub")]) == 0
    return folder / "run"


def command(model: Path, *arguments: object) -> int:
    return cli.main(["generate", str(model), *map(str, arguments)])


def expected(run: Path, *prompts: Prompt, new: int, is_chat: bool = True) -> list[str]:
    opened = open_model(run)
    processor = opened.collator.processor
    samples = encode(prompts, processor, is_chat=is_chat)
    model = load(opened, torch.device("cpu"), torch.float32)
    stops = processor.stop_token_ids
    found = generate(
        model, opened.collator, samples, max_new_tokens=new, stop_token_ids=stops, temperature=0.0, seed=0
    )
    return [processor.decode(ids) for ids in found]


def test_an_answer_on_stdout_and_figures_on_stderr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run.parent / "red.png"
    [text] = expected(run, Prompt("What?", (image, image)), new=6)
    assert command(run, "--prompt", "What?", "--image", image, image, "--max-new-tokens", 6) == 0
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    match = re.fullmatch(STATS, shown.err)
    assert match is not None
    assert match.groups() == ("6", "1", "1")


def test_a_published_folder_says_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "Speak", "--max-new-tokens", 6)
    assert command(run, *arguments) == 0
    first = capsys.readouterr().out
    assert command(run.parent / "hub", *arguments) == 0
    assert capsys.readouterr().out == first


def test_several_answers_are_numbered_and_in_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [Prompt("a"), Prompt("and then\nthere were"), Prompt("c")]
    texts = expected(run, *prompts, new=5, is_chat=False)
    given = [argument for prompt in prompts for argument in ("--prompt", prompt.text)]
    assert command(run, *given, "--raw", "--max-new-tokens", 5, "--batch-size", 2) == 0
    assert capsys.readouterr().out == "".join(f"[{i}] {text}\n" for i, text in enumerate(texts, 1))


def test_objects_for_programs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "é"}, {"prompt": "b", "image": str(run.parent / "red.png")}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed", 5)
    arguments = ("--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 4, "--json", *settings)
    assert command(run, *arguments) == 0
    shown = capsys.readouterr().out
    records = [json.loads(line) for line in shown.splitlines()]
    assert [record["prompt"] for record in records] == ["é", "b"]
    assert all(set(record) == {"prompt", "text", "tokens", "finish"} for record in records)
    assert command(run, *arguments) == 0
    assert capsys.readouterr().out == shown
    assert command(run, *arguments[:-1], 6) == 0
    assert capsys.readouterr().out != shown


def test_a_stop_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [text] = expected(run, Prompt("What?"), new=8)
    stop = text[4:7]
    assert command(run, "--prompt", "What?", "--max-new-tokens", 8, "--stop", stop, "--dtype", "fp32") == 0
    shown = capsys.readouterr()
    assert shown.out == text[: text.index(stop)] + "\n"
    assert "cut at the limit" not in shown.err


def test_text_is_shown_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    listen = tool.in_order(3)
    seen = []
    for said in (
        (1, "b", False),
        (0, "a", False),
        (1, "B", True),
        (0, "A", True),
        (2, "c", False),
        (2, "", True),
    ):
        listen(*said)
        seen.append(capsys.readouterr().out)
    assert seen == ["[1] ", "a", "", "A\n[2] bB\n[3] ", "c", "\n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --prompt TEXT or --prompts FILE"),
        (("--prompts", "x.jsonl", "--image", "y"), "--prompts names its own files"),
        (("--prompts", "x.jsonl"), "x.jsonl: cannot be read"),
        (("--prompt", "x", "--image", "nowhere.png"), "nowhere.png: missing image"),
        (("--prompt", "x", "--top-k", "3"), "set temperature above 0"),
        (("--prompt", "x", "--max-new-tokens", "many"), "invalid int value: 'many'"),
        (("--prompt", "x", "--batch-size", "0"), "--batch-size: 0 is not at least 1"),
        (("--prompt", "word " * 3000), "the prompt has 3"),
        (("--prompt", "", "--raw"), "the prompt is empty"),
        (("--prompt", "x", "--prompt", "", "--raw"), "prompt 2 of 2 is empty"),
        (("--prompt", "x", "--prompt", "\udc80"), "--prompt 2: the text is no valid Unicode"),
        (("--prompt", "x", "--image", "gone.png"), "--prompt 1: gone.png: missing image"),
        (("--prompt", "x", "--pages", "1"), "--pages: for PDFs, and no prompt has one"),
        (("--prompt", "x", "--max-model-len", "9"), "--max-model-len: for PDFs"),
        (("--prompt", "x", "--gallery", "x.png"), "--gallery: for PDFs"),
        (("--prompt", "x", "--image-size", "32"), "--image-size: for images, videos and PDFs"),
        (("--prompt", "x", "--no-split"), "--split or --no-split: for images, videos and PDFs"),
    ],
)
def test_bad_usage_is_one_line_before_weights_are_read(
    run: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "load", None)
    assert command(run, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_images_that_a_folder_cannot_tell_how_to_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run.parent / "hub", "--prompt", "x", "--image", run.parent / "red.png") == 2
    assert "how images were read is not known" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_of_its_own(run: Path) -> None:
    arguments = ("generate", str(run), "--prompt", "x", "--max-new-tokens", "3")
    done = subprocess.run(
        [sys.executable, "-m", "cantata", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(run, Prompt("x"), new=3)[0] + "\n"
    assert re.fullmatch(STATS, done.stderr)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--out", "x.png", "--raw"), "--raw: for answers in text, and --out draws"),
        (
            ("--out", "x.png", "--json", "--max-new-tokens", "3"),
            "--json, --max-new-tokens: for answers in text, and --out draws",
        ),
        (("--guidance", "2"), "--guidance: for drawing images, which --out asks for"),
        (("--size", "16x16"), "--size: for images as codes, which --tokenizer makes"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(
    given: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "nowhere", "--prompt", "What?", *given]) == 2
    assert reason in capsys.readouterr().err
