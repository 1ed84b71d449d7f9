"""`metrics.jsonl` as series, however it ended: broken lines are counted, repeated steps replaced."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INITIAL, EVAL = "eval/initial/", "eval/"
LARGEST_STEP = 2**53
STEP = "step"


class Series(NamedTuple):
    """A named value over the steps at which it was logged, which grow."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """NaN where there was no finite one."""

    @property
    def finite(self) -> NDArray[np.float64]:
        return self.values[np.isfinite(self.values)]

    @property
    def last(self) -> float | None:
        """The last finite value; None without one."""
        return float(self.finite[-1]) if len(self.finite) else None


class Restart(NamedTuple):
    """A place where the file went back to a step that it had already."""

    step: int
    dropped: int
    """Lines of before that the new ones replace."""


@dataclass
class Metrics:
    """Everything that a file says."""

    series: dict[str, Series] = field(default_factory=dict)
    """By name, in the order of their first lines. `eval/initial/x` stands as step 0 of `eval/x`."""
    lines: int = 0
    """Whole lines that hold a step."""
    last_step: int = 0
    broken: int = 0
    """Lines that are no object with a step, a cut last one included."""
    is_cut: bool = False
    """Whether the last line has no end: the run is writing, or was killed while it was."""
    not_numbers: int = 0
    """Values that are neither number nor null."""
    restarts: list[Restart] = field(default_factory=list)

    def without_value(self) -> dict[str, int]:
        """Values that are null or not finite, by name; those that never had one are not among them."""
        gaps = {name: int(np.isnan(series.values).sum()) for name, series in self.series.items()}
        return {name: count for name, count in gaps.items() if 0 < count < len(self.series[name].values)}

    def never_known(self) -> list[str]:
        return [name for name, series in self.series.items() if not len(series.finite)]


class _Column:
    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def cut(self, step: int) -> None:
        """Forget everything from `step` on."""
        if dropped := _cut(self.steps, step):
            del self.values[-dropped:]

    def add(self, step: int, value: float) -> None:
        self.cut(step)
        self.steps.append(step)
        self.values.append(value)


def read_metrics(path: Path) -> Metrics:
    """Read a file that a run may be writing still.

    A line whose step is not above the one before replaces that step and all after it: a run that goes on
    from a checkpoint lives those steps again. Raises `OSError`.
    """
    metrics, steps, columns = Metrics(), array("q"), dict[str, _Column]()
    with path.open("rb") as file:
        for line in file:
            metrics.is_cut = not line.endswith(b"\n")
            record = _parse(line)
            if record is None:
                metrics.broken += 1
                continue
            step = record.pop(STEP)
            dropped = _cut(steps, step)
            if dropped:
                metrics.restarts.append(Restart(step, dropped))
                for column in columns.values():
                    column.cut(step)
            steps.append(step)
            for name, value in record.items():
                number = _number(value)
                if number is None:
                    metrics.not_numbers += 1
                elif name.startswith(INITIAL):
                    columns.setdefault(EVAL + name.removeprefix(INITIAL), _Column()).add(0, number)
                else:
                    columns.setdefault(name, _Column()).add(step, number)
    metrics.lines, metrics.last_step = len(steps), steps[-1] if steps else 0
    metrics.series = {
        name: Series(np.array(column.steps, np.int64), np.array(column.values, np.float64))
        for name, column in columns.items()
        if column.steps
    }
    return metrics


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get(STEP) if isinstance(record, dict) else None
    whole = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < LARGEST_STEP
    return record if whole else None


def _cut(steps: array[int], step: int) -> int:
    """Forget everything from `step` on; returns how many that were."""
    dropped = 0
    while steps and steps[-1] >= step:
        steps.pop()
        dropped += 1
    return dropped


def _number(value: Any) -> float | None:
    """NaN for null and what is not finite; None for what is no number at all."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
