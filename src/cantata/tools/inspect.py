"""`cantata inspect STAGE [overrides]`: the data of a run as its model would read it, without training.

It builds the data and the collator of the stage as training does, reads the first rows, and writes a page
with samples of each source: tokens by their weight in the loss, images as the vision tower gets them,
lengths, packing, and what was left out and why.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console, RenderableType
from rich.console import Group as RichGroup
from rich.table import Table
from rich.text import Text

from cantata.core.config import compose, load, missing_keys
from cantata.core.errors import ConfigError
from cantata.core.schema import dotted
from cantata.core.suggest import hint
from cantata.tools.arguments import Parser
from cantata.tools.inspect_data import Inspection, Picture, Shown, Tally, inspect_stage
from cantata.tools.inspect_html import BINS, page, visible
from cantata.tools.plan import STAGES
from cantata.train import humane, startup
from cantata.train.stage import LanguageStage

EXAMPLES = 5
"""Samples named for each reason to leave samples out."""
UNREAD = "model.weights"
STAND_IN = "not-read-by-inspect"
WIDTH = 110
"""Columns where the summary goes into a file or a pipe."""
BARS = " ▁▂▃▄▅▆▇█"
SPARK, EXCERPT = 16, 320
"""Letters of a histogram, and of the beginning of a sample."""


def read_stage(name: str, overrides: Sequence[str], config_dir: Path | None) -> LanguageStage:
    """The stage's config as training composes it; weights need not be given. Raises `ConfigError`."""
    stages = {known: schema for known, schema in STAGES.items() if issubclass(schema, LanguageStage)}
    if name in STAGES.keys() - stages.keys():
        raise ConfigError(
            f"cantata inspect shows tokens, and {name} trains on pixels; its run keeps pictures in "
            "OUT/samples"
        )
    if name not in stages:
        raise ConfigError(f"{name} is no stage that can be inspected{hint(name, stages)}")
    search = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.absolute()}]"]
    node, origins = compose(name, [*search, *overrides])
    if UNREAD in map(dotted, missing_keys(OmegaConf.to_container(node))):
        OmegaConf.update(node, UNREAD, STAND_IN)
    return load(node, stages[name], origins)


def figures(kind: str, name: str, found: Inspection) -> dict[str, Any]:
    """Everything but the samples as plain values."""
    total = max(1, found.used)
    seconds = max(found.seconds, 1e-9)
    return {
        "stage": kind,
        "name": name,
        "packing": {
            "rows": found.rows,
            "sequence_length": found.sequence_length,
            "row_tokens": found.rows * found.sequence_length,
            "tokens": found.used,
            "efficiency": found.efficiency,
        },
        "modalities": {name: count / total for name, count in found.modalities.items()},
        "seconds": found.seconds,
        "tokens_per_second": found.encoded / seconds,
        "sources": {name: _source(tally, found.sequence_length) for name, tally in found.sources.items()},
        "held_out": dict(found.held_out),
        "notes": list(found.notes),
    }


def _source(tally: Tally, sequence_length: int) -> dict[str, Any]:
    return {
        "samples": tally.size,
        "share": tally.share,
        "read": tally.read,
        "kept": tally.kept,
        "dropped": {
            reason: {"count": len(numbers), "examples": sorted(set(numbers))[:EXAMPLES]}
            for reason, numbers in sorted(tally.dropped.items())
        },
        "tokens": tally.tokens,
        "target_tokens": tally.learned,
        "target_weight": tally.weight,
        "images": sum(isinstance(item, Picture) for shown in tally.shown for item in shown.items),
        "lengths": _lengths(tally.lengths, sequence_length),
    }


def _lengths(lengths: Sequence[int], sequence_length: int) -> dict[str, Any]:
    """Tokens of the samples, the too long ones too; bars from 0 to the longest, or to the row's end."""
    values = np.array(lengths or [0])
    counts, edges = np.histogram(lengths, bins=BINS, range=(0, max(sequence_length, int(values.max()))))
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.quantile(values, 0.95)),
        "max": int(values.max()),
        "edges": [float(edge) for edge in edges],
        "counts": [int(count) for count in counts],
    }


def render(shown: dict[str, Any], found: Inspection, to: Path) -> RenderableType:
    """The same for people, in the style of the start-up report."""
    packing = shown["packing"]
    shares = [f"{name} {share:.1%}" for name, share in shown["modalities"].items() if share]
    facts = [
        (
            "packing",
            f"{packing['efficiency']:.1%} of {packing['row_tokens']:,} tokens in {packing['rows']} rows used",
        ),
        ("tokens", ", ".join(shares) or "none"),
        ("speed", f"{humane.count(shown['tokens_per_second'])} tokens/s read and packed by one process"),
        ("page", str(to)),
    ]
    return RichGroup(
        Text(f"cantata inspect {shown['stage']}: {shown['name']}", style="bold", overflow="fold"),
        startup.facts_table(facts),
        _table(shown),
        *(Text(line, overflow="fold") for line in _dropped(shown)),
        *(_excerpt(tally.shown[0]) for tally in found.sources.values() if tally.shown),
        *(Text(f"  {note}", overflow="fold", style="yellow") for note in shown["notes"]),
    )


def _table(shown: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False, header_style="dim")
    table.add_column("samples", overflow="fold", header_style="bold")
    for column in ("count", "share", "read", "kept", "median", "longest", "learned"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("lengths", no_wrap=True)
    for name, source in shown["sources"].items():
        lengths = source["lengths"]
        learned = source["target_tokens"] / max(1, source["tokens"])
        table.add_row(
            Text(f"  {name}"),
            f"{source['samples']:,}",
            f"{source['share']:.1%}",
            f"{source['read']:,}",
            f"{source['kept']:,}",
            f"{lengths['median']:,.0f}",
            f"{lengths['max']:,}",
            f"{learned:.0%}" if source["tokens"] else "-",
            spark(lengths["counts"]),
        )
    for name, size in shown["held_out"].items():
        table.add_row(Text(f"  {name} (held out)"), f"{size:,}", *["-"] * 6, "")
    return table


def _dropped(shown: dict[str, Any]) -> list[str]:
    return [
        f"  left out of {name}: {drop['count']:,} ({reason}), such as "
        + ", ".join(f"{name}:{number}" for number in drop["examples"])
        for name, source in shown["sources"].items()
        for reason, drop in source["dropped"].items()
    ]


def _excerpt(shown: Shown) -> Text:
    """The beginning of a sample, what is learned in green and underlined."""
    line = Text(f"  {shown.key}  ", style="bold")
    for item in shown.items:
        if len(line) > EXCERPT:
            return line.append(" ...", style="dim")
        if isinstance(item, Picture):
            line.append(f"[{item.image.width} x {item.image.height} {item.modality}]", style="not bold cyan")
        else:
            style = "not bold green underline" if item.weight else "not bold dim"
            line.append(visible(item).replace("\n", ""), style=style)
    return line


def spark(counts: Sequence[int]) -> str:
    """A histogram in one line of `SPARK` letters; what holds anything is seen."""
    width = -(-len(counts) // SPARK)
    sums = [sum(counts[start : start + width]) for start in range(0, len(counts), width)]
    top = max(max(sums), 1)
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in sums)


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return number


def main(arguments: Sequence[str]) -> int:
    """The command; raises `ConfigError` for what training would refuse of the data."""
    parser = Parser(prog="cantata inspect", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    parser.add_argument("overrides", nargs="*", default=[], help="as of the stage")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with overlays of your own")
    parser.add_argument(
        "--samples", type=_positive, default=3, metavar="N", help="samples of each source (%(default)s)"
    )
    parser.add_argument(
        "--rows", type=_positive, default=16, metavar="N", help="packed rows to read (%(default)s)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="the page (default: OUT/inspect.html)")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    given = parser.parse_intermixed_args(list(arguments))
    stage = read_stage(given.stage, given.overrides, given.config_dir)
    to = given.to or stage.out / "inspect.html"
    found = inspect_stage(stage, given.samples, given.rows)
    shown = figures(given.stage, stage.name, found)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page(found, shown), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{to}: the page cannot be written: {error.strerror or error}") from error
    if given.json:
        print(json.dumps({**shown, "page": str(to)}, indent=2, ensure_ascii=False))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        console.print(render(shown, found, to), highlight=False)
    return 0
