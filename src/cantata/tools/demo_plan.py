"""What the demo is going to do, and the first screen that says so."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

OPENING = """\
Small models go through their lives on the data inside this package: 1,906 captioned emoji and some plays. \
About {minutes} minutes on two idle CPU cores, less with a GPU.

{movements}

Needs 3 GB of memory and 2 GB of disk; no GPU, no account, and nothing is downloaded.
Everything goes into [bold]{out}[/bold]: a folder for each run (metrics.jsonl, checkpoints/, samples/), \
emoji.png for what is drawn, report.html for all of it. Stop it when you like: the same command goes on \
where it stopped."""

WIDTH = 88
"""Columns of the first screen, where the terminal has as many."""


class Movement(NamedTuple):
    """A training stage of the demo."""

    folder: str
    """Of its run, beside the others."""
    stage: str
    experiment: str
    overrides: tuple[str, ...]
    minutes: float
    """About, on two idle CPU cores, with what belongs to it."""
    does: str


# In so few steps the rate must stay high for as long as it can.
SHORT = (
    "train.max_steps=600",
    "train.eval_every=600",
    "schedule.warmup_steps=60",
    "schedule.decay_steps=250",
)
TOKENIZER = Movement(
    *("vq", "vq", "emoji_vq", SHORT, 2),
    "an image tokenizer learns to write any emoji as 64 codes",
)
TRAINED = (
    Movement(
        *("pretrain", "pretrain", "aria_mini", ("train.max_steps=75", "train.eval_every=75"), 2),
        "a small Aria, a mixture of experts, learns to name emoji",
    ),
    Movement(
        *("sft", "sft", "emoji_sft", ("train.max_steps=45", "train.eval_every=45"), 1),
        "it learns to say to which group an emoji belongs",
    ),
    Movement(
        *("lora", "lora", "emoji_lora", ("train.max_steps=40", "train.eval_every=40"), 1),
        "the pretrained one learns the same by adapters, experts too",
    ),
)
ARTIST = Movement(
    *("emu3", "pretrain", "emu3_mini", ("train.max_steps=400", "train.eval_every=400"), 2),
    "a small Emu3 learns to draw emoji after their names",
)
MOVEMENTS = (TOKENIZER, *TRAINED, ARTIST)
ENCORE = ("generate", 1, "they answer about unseen emoji, Emu3 draws; a page of it all")
"""The verb of the end, its minutes, and what it does with the page of `cantata report`."""


def opening(out: Path) -> str:
    """The first screen: what is going to happen, for how long, what it needs and where it goes."""
    rows = [*((one.stage, one.minutes, one.does) for one in MOVEMENTS), ENCORE]
    lines = [f"  {n}. {verb:<8}  {minutes} min  {does}" for n, (verb, minutes, does) in enumerate(rows, 1)]
    minutes = sum(minutes for _, minutes, _ in rows)
    return OPENING.format(minutes=minutes, movements="\n".join(lines), out=escape(str(out)))


def announce(console: Console, number: int, verb: str, minutes: float, does: str) -> None:
    """The line over a movement."""
    console.print()
    console.rule(f"[bold]{number} of {len(MOVEMENTS) + 1}: {verb}[/bold], about {minutes} min", align="left")
    console.print(f"{does}\n", highlight=False)
