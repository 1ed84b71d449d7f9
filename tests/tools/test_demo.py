"""What the demo shows of a run, from a run directory made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cantata.core.errors import RunError
from cantata.tools import demo
from cantata.tools.demo import held_out_losses
from cantata.tools.demo import show_captions as show
from cantata.tools.demo_drawing import drawn_names
from cantata.tools.demo_plan import (
    ARTIST,
    TOKENIZER,
    TRAINED,
    Movement,
)
from cantata.tools.prompts import read_prompts
from tests.tools.report.runs import make_run

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 9.0, "eval/initial/loss": 8.75},
    {"step": 2, "loss": 7.0},
    {"step": 3, "loss": 5.0, "eval/loss": 4.5},
    {"step": 4, "loss": 3.0, "eval/loss": 2.25},
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def test_it_ends_with_a_page_of_each_run_and_of_all(tmp_path: Path) -> None:
    for name in ("vq", "pretrain", "sft", "lora", "emu3"):
        make_run(tmp_path / name)
    text = io.StringIO()
    demo.show_reports(Console(file=text, width=300), tmp_path)
    assert f"report of all runs: {tmp_path / 'report.html'}; of each: " in text.getvalue()
    assert "5 runs side by side" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.glob("*/report.html"))) == 5


def caption(says: str) -> list[dict[str, Any]]:
    return [{"sample": "emoji:7", "truth": "grinning cat", "caption": says}]


def test_losses_are_the_first_and_the_last_ones(tmp_path: Path) -> None:
    assert held_out_losses(write(tmp_path / "metrics.jsonl", LINES)) == (8.75, 2.25)


@pytest.mark.parametrize("lines", [[], LINES[1:2], LINES[:2], LINES[2:]])
def test_a_run_that_was_not_evaluated_is_told_what_to_set(
    tmp_path: Path, lines: list[dict[str, Any]]
) -> None:
    with pytest.raises(RunError, match=r"metrics\.jsonl holds no evaluation; run with train\.eval_every"):
        held_out_losses(write(tmp_path / "metrics.jsonl", lines))


def test_the_table_sets_the_last_captions_beside_the_first(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", LINES)
    for step, says in ((0, "zzz"), (50, "midway"), (100, "cat with é [bold]")):
        write(tmp_path / "samples" / f"step-{step:08d}.jsonl", caption(says))
    text = io.StringIO()
    show(Console(file=text, width=200), tmp_path)
    shown = text.getvalue()
    assert all(word in shown for word in ("grinning cat", "zzz", "cat with é"))
    assert "midway" not in shown
    assert "before 8.7500, after 2.2500" in shown


def test_a_caption_is_shown_as_it_is(tmp_path: Path) -> None:
    """A model may well say what a terminal would take for markup."""
    write(tmp_path / "metrics.jsonl", LINES)
    write(tmp_path / "samples" / "step-00000000.jsonl", caption("[/b] [red]"))
    text = io.StringIO()
    show(Console(file=text, width=200), tmp_path)
    assert "[/b] [red]" in text.getvalue()


def test_missing_captions_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", LINES)
    with pytest.raises(RunError, match="holds no captions"):
        show(Console(file=io.StringIO()), tmp_path)


ANSWERED = [
    {"step": 1, "eval/initial/accuracy": 0.0, "eval/initial/majority": 0.2},
    {"step": 2, "eval/accuracy": 0.5, "eval/majority": 0.2},
]


def test_questions_are_pictures_of_held_out_emoji_with_their_truths(tmp_path: Path) -> None:
    path, questions = demo.write_questions(tmp_path / "questions")
    prompts = read_prompts(path)
    assert len(prompts) == len(questions) == demo.QUESTIONS
    assert {prompt.text for prompt in prompts} == {demo.QUESTION}
    assert [[image.name for image in prompt.images] for prompt in prompts] == [[q.picture] for q in questions]
    assert all(image.is_file() for prompt in prompts for image in prompt.images)
    assert questions[0].name == "pensive face"
    assert questions[0].truth == "Smileys & Emotion"


def test_answers_stand_beside_the_truth_and_the_accuracies_below(tmp_path: Path) -> None:
    for stage in ("sft", "lora"):
        write(tmp_path / stage / "metrics.jsonl", ANSWERED)
    text, questions = io.StringIO(), [demo.Question("0.png", "[b]pensive", "Smileys")]
    answers = {"sft": ["Smileys"], "lora": ["Flags"]}
    demo.show_answers(Console(file=text, width=200), tmp_path, questions, answers)
    shown = text.getvalue()
    assert all(word in shown for word in ("[b]pensive", "Smileys", "Flags"))
    assert "sft: 0% right before, 50% after (the commonest group: 20%)" in shown
    assert "lora: 0% right before" in shown


@pytest.mark.parametrize("lines", [[], LINES])
def test_a_run_that_asked_nothing_is_told_what_to_set(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(RunError, match=r"holds no accuracy; run with train\.eval_every"):
        demo.accuracy(write(tmp_path / "metrics.jsonl", lines))


def test_precision_is_what_multiplies_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([tick for dtype in (3.0, 1.0) for _ in range(5) for tick in (0.0, dtype)])
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(ticks))
    assert demo.faster_precision() == "fp32"
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: True)
    assert demo.faster_precision() == "bf16"


@pytest.mark.parametrize("fails", [None, "vq.py", "tokenize", "export", "lora.py"])
def test_it_goes_through_the_movements_by_recipes_and_verbs_and_stops_at_a_failure(
    fails: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        words = [Path(word).name if word.endswith(".py") else word for word in command[1:]]
        commands.append(words)
        answers = "".join(json.dumps({"text": "Flags"}) + "\n" for _ in range(demo.QUESTIONS))
        return SimpleNamespace(returncode=75 * (fails in words), stdout=answers)

    shown: list[Any] = []
    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "show_captions", lambda console, run: shown.append(run))
    monkeypatch.setattr(demo, "show_answers", lambda console, out, questions, answers: shown.append(answers))
    monkeypatch.setattr(demo, "show_reports", lambda console, out: shown.append(out))
    monkeypatch.setattr(demo, "picture_of", lambda out, names: Image.new("RGB", (2, 2)))
    monkeypatch.setattr(demo, "faster_precision", lambda: "fp32")
    assert demo.main(["--out", str(tmp_path), "train.max_steps=20"]) == (75 if fails else 0)
    announced = [line for line in capsys.readouterr().out.splitlines() if " of 6: " in line]
    assert len(announced) == {None: 6, "vq.py": 1, "tokenize": 1, "export": 2, "lora.py": 4}[fails]

    def trained(movement: Movement, *given: str) -> list[str]:
        folder, stage, experiment, own, *_ = movement
        run = f"out={tmp_path / folder}"
        return [f"{stage}.py", f"experiment={experiment}", run, *own, *given, "train.max_steps=20"]

    weights = f"model.weights={tmp_path / 'pretrain-hf'}"
    pretrain, *fine_tunes = TRAINED
    codes = tmp_path / "codes"
    expected = [
        trained(TOKENIZER),
        ["-m", "cantata", "tokenize", f"tokenizer={tmp_path / 'vq'}", f"out={codes}"],
        trained(pretrain, "engine.precision=fp32"),
        ["-m", "cantata", "export", str(tmp_path / "pretrain"), "--to", str(tmp_path / "pretrain-hf")],
        *(trained(movement, weights, "engine.precision=fp32") for movement in fine_tunes),
        trained(ARTIST, f"data.sources.draw.dataset.path={codes}", "engine.precision=fp32"),
    ]
    ends = {None: 7, "vq.py": 1, "tokenize": 2, "export": 4, "lora.py": 6}[fails]
    assert commands[:7] == expected[:ends]
    if fails:
        assert shown == []
        return
    assert [words[:3] for words in commands[7:]] == [["-m", "cantata", "generate"]] * 3
    assert commands[9].count("--prompt") == len(drawn_names())
    assert (tmp_path / "emoji.png").is_file()
    answers = dict.fromkeys(("sft", "lora"), ["Flags"] * demo.QUESTIONS)
    assert shown == [tmp_path / "pretrain", answers, tmp_path]


def test_a_model_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=""))
    with pytest.raises(RunError, match=r"cantata generate .* failed"):
        demo.ask(tmp_path / "run", tmp_path / "prompts.jsonl")
