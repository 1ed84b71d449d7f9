"""What `cantata plan --find` says: ways to run a stage that fit a memory, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cantata.train import humane
from cantata.train.find import HEADROOM, LINK, Found, Search
from cantata.train.stage import Stage

COLUMNS = ("micro-batch", "x", "ep", "recompute", "memory", "of it activations", "step")


def figures(search: Search, stage: Stage) -> dict[str, Any]:
    """Everything as plain values, memory in bytes; `found` is empty where nothing fits."""
    cluster = stage.cluster
    return {
        "name": stage.name,
        "ranks": cluster.gpus,
        "gpu": cluster.gpu,
        "mfu": cluster.mfu,
        "memory_gib": cluster.limit_gib,
        "headroom": HEADROOM,
        "link_bytes_per_second": LINK,
        "candidates": search.candidates,
        "found": [_values(found) for found in search.fitting],
        "smallest": _values(search.smallest),
    }


def _values(found: Found) -> dict[str, Any]:
    way, memory = found.candidate, found.memory
    return {
        "micro_batch_size": way.micro_batch_size,
        "gradient_accumulation_steps": way.gradient_accumulation_steps,
        "ep": way.ep,
        "recompute": way.recompute.value,
        "memory": {**asdict(memory), "total": memory.total},
        "step_seconds": found.step_seconds,
        "overrides": way.overrides(),
    }


def render(kind: str, stage: Stage, search: Search) -> RenderableType:
    """The fastest that fit, and what to paste; or the smallest, and what else could change."""
    cluster = stage.cluster
    limit = f"{HEADROOM:.0%} of {cluster.limit_gib:g} GiB"
    title = Text(f"cantata plan {kind} --find: {stage.name}", style="bold", overflow="fold")
    searched = Text(
        f"  {search.candidates} ways with as many tokens a step on {cluster.gpus} x {cluster.gpu}; what fits "
        f"into {limit}, the fastest first: operations at MFU {cluster.mfu:g}, bytes at {LINK / 1e9:g} GB/s",
        overflow="fold",
    )
    if search.fitting:
        pasted = [Text("  " + " ".join(search.fitting[0].candidate.overrides()), overflow="fold")]
        return Group(title, searched, _table(search.fitting), Text("  the first of them:"), *pasted)
    lines = [
        f"  nothing fits into {limit}; the least that was found:",
        "  other ways to need less: more ranks (cluster.gpus), train.sequence_length, "
        "engine.state_dtype=bf16, engine.offload, a GPU with more memory",
    ]
    return Group(title, searched, Text(lines[0]), _table([search.smallest]), Text(lines[1], overflow="fold"))


def _table(rows: list[Found]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for way, memory, seconds in rows:
        table.add_row(
            str(way.micro_batch_size),
            str(way.gradient_accumulation_steps),
            str(way.ep),
            way.recompute.value,
            humane.size(memory.total),
            humane.size(memory.activations + memory.logits + memory.all_to_all),
            f"{seconds:.3g} s",
        )
    return table
