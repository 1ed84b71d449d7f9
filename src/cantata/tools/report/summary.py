"""What is asked of a run first: how it stands, how far it came, how well, how fast and in how much memory."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from cantata.tools.report.metrics import Series
from cantata.tools.report.run import Run
from cantata.tools.report.series import exact
from cantata.tools.report.state import BROKEN, RUNNING
from cantata.train import humane

HELD_OUT = "eval/loss"
SCORES = {"eval/accuracy": "accuracy", "eval/psnr": "psnr", "eval/ssim": "ssim", "mfu": "mfu"}
"""Shown where a run has them."""


class Fact(NamedTuple):
    """A figure and what to know of it."""

    name: str
    value: str
    remark: str = ""


def facts(run: Run) -> list[Fact]:
    """The same figures in the same order for every run; `-` where a run has none."""
    series, metrics = run.metrics.series, run.metrics
    limit = "" if run.max_steps is None else f"of {run.max_steps:,}"
    tokens, training = series.get("tokens"), series.get("loss")
    told = [
        Fact("state", run.state.word, "why stands below" if run.state.word == BROKEN else run.state.detail),
        Fact("steps", f"{metrics.last_step:,}", limit),
        Fact("tokens", _count(tokens.last if tokens else None), _targets(series.get("target_tokens"))),
        _time(run),
        Fact("loss", _shown(training.last if training else None), _lowest(training)),
        _held_out(series.get(HELD_OUT)),
        _middle("speed", series.get("tokens_per_second_per_device"), "tok/s a device, median"),
        Fact("memory", *_memory(series.get("memory_gib"))),
    ]
    for name, title in SCORES.items():
        if name in series and series[name].last is not None:
            told.append(Fact(title, _shown(series[name].last), _lowest(series[name], highest=True)))
    return told


def _time(run: Run) -> Fact:
    if run.starts:
        now = datetime.now(UTC) if run.state.word == RUNNING else None
        seconds = sum(start.seconds(now if start is run.starts[-1] else None) for start in run.starts)
        times = len(run.starts)
        unknown = any(start.end is None for start in run.starts[:-1]) or (
            run.starts[-1].end is None and run.state.word != RUNNING
        )
        whole = "so far" if run.state.word == RUNNING else "start to end"
        remark = f"in {times} starts" if times > 1 else whole
        return Fact(
            "time", humane.duration(seconds), remark + (", without what was killed" if unknown else "")
        )
    took = run.metrics.series.get("step_seconds")
    if took is None or not len(took.finite):
        return Fact("time", "-")
    steps = np.diff(took.steps, prepend=0)
    return Fact("time", humane.duration(float(np.nansum(took.values * steps))), "in steps alone")


def _held_out(series: Series | None) -> Fact:
    if series is None or not len(series.finite):
        return Fact("held-out loss", "-")
    found = series.finite
    first = f"first {exact(found[0])}, " if len(found) > 1 else ""
    best = int(np.nanargmin(series.values))
    return Fact(
        "held-out loss", exact(found[-1]), f"{first}best {exact(found.min())} at {series.steps[best]:,}"
    )


def _lowest(series: Series | None, highest: bool = False) -> str:
    if series is None or not len(series.finite):
        return ""
    best = int(np.nanargmax(series.values) if highest else np.nanargmin(series.values))
    return f"{'best' if highest else 'lowest'} {exact(series.values[best])} at {series.steps[best]:,}"


def _middle(name: str, series: Series | None, remark: str) -> Fact:
    if series is None or not len(series.finite):
        return Fact(name, "-")
    return Fact(name, humane.count(float(np.median(series.finite))), remark)


def _memory(series: Series | None) -> tuple[str, str]:
    if series is None or not len(series.finite):
        return "-", ""
    return f"{series.finite.max():.3g} GiB", "of a rank, most"


def _targets(series: Series | None) -> str:
    return "" if series is None or series.last is None else f"{humane.count(series.last)} learned"


def _count(value: float | None) -> str:
    return "-" if value is None else humane.count(value)


def _shown(value: float | None) -> str:
    return "-" if value is None else exact(value)
