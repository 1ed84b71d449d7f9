"""`cantata demo`: the movements of a model's life, from nothing to answers, in minutes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cantata.core.build import build
from cantata.core.errors import RunError
from cantata.core.locate import recipes_dir
from cantata.tools.arguments import Parser
from cantata.tools.demo_drawing import drawn_names, picture_of
from cantata.tools.demo_plan import ENCORE, MOVEMENTS, WIDTH, Movement, announce, opening
from cantata.tools.plan import read_stage
from cantata.tools.report.command import FILE as REPORT
from cantata.tools.report.command import write_report
from cantata.train.humane import duration

QUESTION, QUESTIONS = "Which group?", 8


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit code of the first movement that fails, or 0."""
    parser = Parser(prog="cantata demo", description=__doc__)
    parser.add_argument("--out", default="outputs/demo", help="folder of its runs (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="more for each training, such as train.max_steps=20")
    arguments = parser.parse_args(argv)
    out, console = Path(arguments.out), Console()
    console.print(Panel(opening(out), title="Cantata", width=min(console.width, WIDTH)))
    precision = f"engine.precision={faster_precision()}"
    codes = (f"data.sources.draw.dataset.path={out / 'codes'}", precision)
    weights = (f"model.weights={out / 'pretrain-hf'}", precision)
    given = {"pretrain": (precision,), "sft": weights, "lora": weights, "emu3": codes}
    for number, movement in enumerate(MOVEMENTS, start=1):
        announce(console, number, movement.stage, movement.minutes, movement.does)
        began = time.monotonic()
        code = train(out, movement, (*given.get(movement.folder, ()), *arguments.overrides))
        if code:
            return code
        console.print(f"{movement.stage}: {duration(time.monotonic() - began)}, in {out / movement.folder}")
    announce(console, len(MOVEMENTS) + 1, *ENCORE)
    show_captions(console, out / "pretrain")
    file, questions = write_questions(out / "questions")
    answers = {stage: ask(out / stage, file) for stage in ("sft", "lora")}
    show_answers(console, out, questions, answers)
    show_drawings(console, out)
    show_reports(console, out)
    return 0


def faster_precision() -> str:
    """In what this machine multiplies matrices faster: CPUs without bf16 instructions do it in fp32."""
    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        matrix = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        seconds[name] = min(times)
    return min(seconds, key=lambda name: seconds[name])


def train(out: Path, movement: Movement, overrides: Sequence[str]) -> int:
    """One movement, and what others need of it: the tokenizer's codes, the pretrained model's folder."""
    folder, stage, experiment, own, *_ = movement
    run = out / folder
    arguments = [f"experiment={experiment}", f"out={run}", *own, *overrides]
    code = subprocess.run(
        [sys.executable, str(recipes_dir() / f"{stage}.py"), *arguments], check=False
    ).returncode
    if code == 0 and folder == "vq":
        return cantata("tokenize", f"tokenizer={run}", f"out={out / 'codes'}").returncode
    if code == 0 and folder == "pretrain" and not (out / "pretrain-hf").exists():
        return cantata("export", str(run), "--to", str(out / "pretrain-hf")).returncode
    return code


def cantata(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own."""
    command = [sys.executable, "-m", "cantata", *arguments]
    return subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if capture else None)


class Question(NamedTuple):
    """What is asked of a held-out emoji."""

    picture: str
    name: str
    truth: str


def write_questions(folder: Path) -> tuple[Path, list[Question]]:
    """A few held-out emoji as pictures, and the file of prompts that asks for their groups."""
    named, grouped = (_held_out("pretrain", "aria_mini"), _held_out("sft", "emoji_sft"))
    folder.mkdir(parents=True, exist_ok=True)
    questions = []
    for number in range(QUESTIONS):
        index = number * len(named) // QUESTIONS
        picture, name = named[index].parts
        file = folder / f"{index}.png"
        picture.save(file)
        questions.append(Question(file.name, name, grouped[index].messages[-1].parts[0]))
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": QUESTION, "image": question.picture}) for question in questions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, questions


def _held_out(stage: str, experiment: str) -> Any:
    return build(read_stage(stage, [f"experiment={experiment}"], None).data.held_out["emoji"].dataset)


def ask(run: Path, questions: Path) -> list[str]:
    """What a run's model answers. Raises `RunError` where it does not."""
    asked = cantata(
        "generate", str(run), "--prompts", str(questions), "--max-new-tokens", "10", "--json", capture=True
    )
    if asked.returncode:
        raise RunError(f"cantata generate {run} failed; the reason stands above")
    return [record["text"] for record in map(json.loads, asked.stdout.splitlines())]


def show_drawings(console: Console, out: Path) -> None:
    """Let Emu3 draw emoji by name, half of them never trained on, beside the real ones.

    Raises `RunError` where it does not.
    """
    names = drawn_names()
    target = out / "drawn" / "emoji.png"
    prompts = [word for name in names for word in ("--prompt", name)]
    for old in target.parent.glob("emoji-*.png"):
        old.unlink()
    drawn = cantata(
        *("generate", str(out / "emu3"), *prompts, "--tokenizer", str(out / "vq"), "--out", str(target)),
        *("--temperature", "1", "--top-k", "32", "--batch-size", str(len(names))),
    )
    if drawn.returncode:
        raise RunError(f"cantata generate {out / 'emu3'} failed; the reason stands above")
    sheet = out / "emoji.png"
    picture_of(target, names).save(sheet)
    console.print(
        f"drawn by name, the real emoji above each: {sheet} ({', '.join(names)}; the last half unseen)",
        highlight=False,
        markup=False,
    )


def show_reports(console: Console, out: Path) -> None:
    """A page of each run, and one of all side by side."""
    runs = [out / movement.folder for movement in MOVEMENTS]
    for run in runs:
        write_report([run])
    _, page = write_report(runs, out / REPORT)
    console.print(
        f"report of all runs: {page}; of each: {runs[0] / REPORT}, ...", highlight=False, markup=False
    )


def show_captions(console: Console, run: Path) -> None:
    """The table of captions and the held-out losses of a finished pretraining.

    Raises `RunError` where the run left no evaluation to show.
    """
    before, after = held_out_losses(run / "metrics.jsonl")
    samples = sorted((run / "samples").glob("step-*.jsonl"))
    if not samples:
        raise RunError(f"{run / 'samples'} holds no captions; run with train.eval_every above 0")
    first, last = read(samples[0]), read(samples[-1])
    table = Table(title="Held-out emoji, never trained on", title_justify="left")
    for column in ("emoji", "untrained model says", "trained model says"):
        table.add_column(column, overflow="fold")
    for untrained, trained in zip(first, last, strict=True):
        # Plain text: what a model says may look like markup.
        cells = (trained["truth"], untrained["caption"][:40], trained["caption"][:60])
        table.add_row(*(Text(cell) for cell in cells))
    console.print()
    console.print(table)
    console.print(
        f"held-out loss before {before:.4f}, after {after:.4f}; everything is in {run}",
        highlight=False,
        markup=False,
    )


def show_answers(
    console: Console, out: Path, questions: Sequence[Question], answers: dict[str, list[str]]
) -> None:
    """The questions with both models' answers, and how many of more held-out ones were right."""
    table = Table(title=f"{QUESTION} Held-out emoji", title_justify="left")
    for column in ("emoji", "truth", *answers):
        table.add_column(column, overflow="fold")
    for question, *said in zip(questions, *answers.values(), strict=True):
        table.add_row(*(Text(cell) for cell in (question.name, question.truth, *said)))
    console.print()
    console.print(table)
    for stage in answers:
        before, after, majority = accuracy(out / stage / "metrics.jsonl")
        console.print(
            f"{stage}: {before:.0%} right before, {after:.0%} after (the commonest group: {majority:.0%}); "
            f"everything is in {out / stage}",
            highlight=False,
            markup=False,
        )


def accuracy(path: Path) -> tuple[float, float, float]:
    """(before the first step, at the end, of always saying the commonest) of a `metrics.jsonl`.

    Raises `RunError` where no question was asked.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    before = [record["eval/initial/accuracy"] for record in records if "eval/initial/accuracy" in record]
    after = [record for record in records if "eval/accuracy" in record]
    if not before or not after:
        raise RunError(f"{path} holds no accuracy; run with train.eval_every and accuracy.samples above 0")
    return before[0], after[-1]["eval/accuracy"], after[-1]["eval/majority"]


def held_out_losses(path: Path) -> tuple[float, float]:
    """(before the first step, at the end) of a `metrics.jsonl`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    before = [record["eval/initial/loss"] for record in records if "eval/initial/loss" in record]
    after = [record["eval/loss"] for record in records if "eval/loss" in record]
    if not before or not after:
        raise RunError(f"{path} holds no evaluation; run with train.eval_every above 0")
    return before[0], after[-1]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
