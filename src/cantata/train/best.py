"""The best evaluation of a run so far, by one metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cantata.train.metrics import Record

Mode = Enum("Mode", {"min": "min", "max": "max"}, module=__name__)
"""Whether less of a metric is better, or more."""


@dataclass(frozen=True)
class BestConfig:
    """Which checkpoint is the best one."""

    metric: str
    """A name of an evaluation's line, such as `eval/loss`."""
    mode: Mode
    """`min` or `max`."""


class Best:
    """Remembers the best value of a metric and its step; the same on every rank, as evaluations are.

    Args:
        config: the metric; None: nothing is ever better.
        min_delta: a value counts as better only where it is by more than this.
    """

    def __init__(self, config: BestConfig | None, min_delta: float = 0.0) -> None:
        self._config = config
        self._min_delta = min_delta
        self.forget()

    def forget(self) -> None:
        self.value: float | None = None
        self.step: int | None = None

    def update(self, step: int, record: Record) -> bool:
        """Whether this step's line is the best yet; a line without the metric, or with NaN, is not."""
        value = None if self._config is None else record.get(self._config.metric)
        if value is None or not math.isfinite(value) or not self._is_better(value):
            return False
        self.value, self.step = float(value), step
        return True

    def _is_better(self, value: float) -> bool:
        assert self._config is not None
        if self.value is None:
            return True
        gain = value - self.value if self._config.mode is Mode.max else self.value - value
        return gain > self._min_delta

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"of": self._of(), "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one that went by another metric says nothing of this one."""
        self.forget()
        if state["of"] == self._of():
            self.value, self.step = state["value"], state["step"]

    def _of(self) -> list[str] | None:
        return None if self._config is None else [self._config.metric, self._config.mode.value]
