"""`cantata demo`: the main thing, from nothing to captions, in minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cantata.core.errors import RunError
from cantata.core.locate import recipes_dir
from cantata.tools.arguments import Parser

PLAN = """\
A small Aria (vision tower, projector, mixture-of-experts decoder) learns, from random weights, to \
name emoji and to write like a play, on the data inside this package. Nothing is downloaded.

  1. pretrain experiment=aria_mini into [bold]{out}[/bold]: under five minutes on two CPU cores
  2. captions of held-out emoji, and the held-out loss before and after

Stop it whenever you like: the same command goes on where it stopped."""


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit code of the training, or 0."""
    parser = Parser(prog="cantata demo", description=__doc__)
    parser.add_argument("--out", default="outputs/demo", help="run directory (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="more overrides for the run, such as train.max_steps=20")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    console = Console()
    console.print(Panel(PLAN.format(out=escape(str(out))), title="Cantata", width=min(console.width, 88)))
    command = [sys.executable, str(recipes_dir() / "pretrain.py"), "experiment=aria_mini", f"out={out}"]
    code = subprocess.run([*command, *arguments.overrides], check=False).returncode
    if code:
        return code
    show(console, out)
    return 0


def show(console: Console, out: Path) -> None:
    """The table of captions and the held-out losses of a finished run.

    Raises `RunError` where the run left no evaluation to show.
    """
    before, after = held_out_losses(out / "metrics.jsonl")
    samples = sorted((out / "samples").glob("step-*.jsonl"))
    if not samples:
        raise RunError(f"{out / 'samples'} holds no captions; run with train.eval_every above 0")
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
        f"held-out loss before {before:.4f}, after {after:.4f}; everything is in {out}",
        highlight=False,
        markup=False,
    )


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
