"""The start-up report: what will be trained, on what, and whether it fits, told before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cantata.train import humane
from cantata.train.memory import MemoryEstimate
from cantata.train.traffic import Traffic

WIDTH = 88
"""Columns of the report as text."""


@dataclass(frozen=True)
class GroupRow:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    parameters: int
    learning_rate: float | None
    """Peak learning rate; None where the parameters are frozen."""
    weight_decay: float | None


@dataclass(frozen=True)
class SourceRow:
    """A source of samples."""

    name: str
    samples: int | None
    """Samples it holds; None where it does not know."""
    share: float | None
    """Share of the samples drawn, in [0, 1]; None for held-out sources."""


@dataclass(frozen=True)
class Experts:
    """What a mixture of experts holds and what one token uses of it."""

    layers: int
    num_experts: int
    top_k: int
    total_parameters: int
    active_parameters: int


@dataclass(frozen=True)
class StartupReport:
    """What a run is about to do."""

    stage: str
    name: str
    out: Path
    origin: str
    """`from scratch`, `from weights DIR`, or `resumed from step-00000100`."""
    engine: str
    """The engine with its settings, such as `fsdp2, bf16, states fp32`."""
    mesh: Mapping[str, int]
    world_size: int
    device: str
    versions: str
    """Versions of the libraries that matter, such as `torch 2.13.0`."""
    groups: Sequence[GroupRow]
    experts: Experts | None
    sources: Sequence[SourceRow]
    held_out: Sequence[SourceRow]
    max_steps: int
    micro_batch_size: int
    sequence_length: int
    """Tokens of a row; codes of an image."""
    gradient_accumulation_steps: int
    memory: MemoryEstimate | None
    """Per rank."""
    traffic: Traffic | None
    """Of a rank, where experts are spread over ranks."""
    flops_per_step: float | None
    """Forward and backward operations of a full step over all ranks."""
    row: str = "rows"
    """What a micro-batch is counted in."""
    token: str = "tokens"
    """What a row is counted in."""
    notes: Sequence[str] = ()
    """Whatever else the user should know: dropped samples, where W&B writes."""

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step over all ranks; packing leaves a few of them empty."""
        per_rank = self.micro_batch_size * self.sequence_length * self.gradient_accumulation_steps
        return per_rank * self.world_size


def render(report: StartupReport) -> RenderableType:
    """The report for a terminal, at most `WIDTH` columns wide."""
    parts: list[RenderableType] = [
        Text(f"cantata {report.stage}: {report.name}", style="bold", overflow="fold"),
        facts_table(_facts(report)),
        groups_table(report.groups),
    ]
    if report.sources:
        parts.append(_sources(report))
    if report.memory is not None:
        parts.append(memory_table(report.memory))
    parts += [Text(f"  {note}", overflow="fold") for note in report.notes]
    return Group(*parts)


def as_text(report: StartupReport) -> str:
    """The report without colours, `WIDTH` columns wide, for a file or a pipe."""
    return plain(render(report))


def plain(content: RenderableType) -> str:
    """The same of anything that can be rendered."""
    console = Console(width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(content, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def write(report: StartupReport) -> Path:
    """Save the report as `<out>/logs/startup.txt`."""
    path = report.out / "logs" / "startup.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(report), encoding="utf-8")
    return path


def facts_table(facts: Sequence[tuple[str, str]]) -> Table:
    """Names and what is to be said of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", Text(value))
    return table


def _facts(report: StartupReport) -> list[tuple[str, str]]:
    facts = [
        ("run", f"{report.out} ({report.origin})"),
        ("devices", f"{ranks_text(report.world_size, report.mesh, report.device)}; {report.versions}"),
        ("engine", report.engine),
        ("step", _step(report)),
    ]
    if report.experts is not None:
        facts.append(("experts", experts_text(report.experts)))
    if report.traffic is not None:
        facts.append(("exchange", traffic_text(report.traffic)))
    return facts


def ranks_text(world_size: int, mesh: Mapping[str, int], device: str | None = None) -> str:
    """`64 ranks on H100 (dp_shard 64, ep 8)`."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    return ranks + (f" on {device}" if device else "") + (f" ({axes})" if axes else "")


def traffic_text(traffic: Traffic) -> str:
    """What a rank sends to the experts of others."""
    return (
        f"{humane.size(traffic.bytes_each)} leave a rank in one all-to-all if routing is balanced, "
        f"{traffic.per_step:,} times a step: {humane.size(traffic.bytes_per_step)}"
    )


def _step(report: StartupReport) -> str:
    factors = [
        f"{report.micro_batch_size} {report.row}",
        f"{report.sequence_length} {report.token}",
        f"{report.gradient_accumulation_steps} micro-batches",
        f"{report.world_size} ranks",
    ]
    shown = " x ".join(factors[:2] + [factor for factor in factors[2:] if not factor.startswith("1 ")])
    text = f"{report.tokens_per_step:,} {report.token} ({shown})"
    if report.flops_per_step is not None:
        text += f", {humane.flops(report.flops_per_step)}"
    total = humane.count(report.tokens_per_step * report.max_steps)
    return f"{text}; {report.max_steps:,} steps, {total} {report.token}"


def experts_text(experts: Experts) -> str:
    """How many parameters there are, and how many one token uses."""
    share = experts.active_parameters / experts.total_parameters
    return (
        f"{experts.layers} layers, {experts.top_k} of {experts.num_experts} per token: "
        f"{humane.count(experts.active_parameters)} of {humane.count(experts.total_parameters)} parameters "
        f"active ({share:.0%})"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=True, show_edge=False, header_style="dim")
    table.add_column(title, overflow="fold", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def groups_table(groups: Sequence[GroupRow]) -> Table:
    """What is trained how, and what is frozen."""
    table = _table("parameters", "count", "learning rate", "weight decay")
    for row in groups:
        frozen = row.learning_rate is None
        rate = "frozen" if row.learning_rate is None else f"{row.learning_rate:.3g}"
        decay = "-" if frozen or row.weight_decay is None else f"{row.weight_decay:g}"
        style = "dim" if frozen else None
        table.add_row(Text(f"  {row.name}"), humane.count(row.parameters), rate, decay, style=style)
    trained, frozen_too = split_counts(groups)
    total = f"{humane.count(trained)} trained"
    if frozen_too:
        total += f", {humane.count(frozen_too)} frozen"
    table.add_row(f"  total: {total}", humane.count(trained + frozen_too), "", "", style="bold")
    return table


def split_counts(groups: Sequence[GroupRow]) -> tuple[int, int]:
    """Trained and frozen parameters."""
    trained = sum(group.parameters for group in groups if group.learning_rate is not None)
    return trained, sum(group.parameters for group in groups) - trained


def _sources(report: StartupReport) -> Table:
    table = _table("samples", "count", "share")
    for row in (*report.sources, *report.held_out):
        samples = "unknown" if row.samples is None else f"{row.samples:,}"
        share = "held out" if row.share is None else f"{row.share:.1%}"
        table.add_row(Text(f"  {row.name}"), samples, share)
    return table


def memory_table(memory: MemoryEstimate) -> Table:
    """The parts of a rank's memory."""
    table = _table("memory of a rank (estimate)", "size", "share")
    for name, number_of_bytes in memory.parts().items():
        table.add_row(f"  {name}", humane.size(number_of_bytes), f"{number_of_bytes / memory.total:.0%}")
    table.add_row("  total", humane.size(memory.total), "", style="bold")
    return table
