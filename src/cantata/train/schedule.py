"""Learning-rate schedules: pure functions of the step, so a resumed run needs no state of theirs.

Each is called with the number of steps taken so far (0 for the first one) and the run's last step, and
returns the factor that multiplies every group's base rate. All of them warm up linearly: the first
step runs at `1 / warmup_steps`, the last step of the warm-up at the full rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from cantata.core.errors import ConfigError


class Schedule(Protocol):
    def __call__(self, step: int, max_steps: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The full rate after the warm-up."""

    warmup_steps: int

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)

    def __call__(self, step: int, max_steps: int) -> float:
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Linear:
    """Falls along a line to `min_ratio`, which the step after the last one would run at."""

    warmup_steps: int
    min_ratio: float

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_ratio(self.min_ratio)

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return 1.0 - (1.0 - self.min_ratio) * _done(step, self.warmup_steps, max_steps)


@dataclass(frozen=True)
class Cosine:
    """Falls along half a cosine to `min_ratio` (Loshchilov and Hutter 2017, without restarts)."""

    warmup_steps: int
    min_ratio: float

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_ratio(self.min_ratio)

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        falling = 0.5 * (1.0 + math.cos(math.pi * _done(step, self.warmup_steps, max_steps)))
        return self.min_ratio + (1.0 - self.min_ratio) * falling


@dataclass(frozen=True)
class WarmupStableDecay:
    """The full rate until `decay_steps` before the end, then a line to `min_ratio` (Hu et al. 2024)."""

    warmup_steps: int
    decay_steps: int
    min_ratio: float

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps)
        _check_steps("decay_steps", self.decay_steps)
        _check_ratio(self.min_ratio)

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        # A decay longer than what the warm-up leaves starts where the warm-up ends.
        start = max(self.warmup_steps, max_steps - self.decay_steps)
        return 1.0 - (1.0 - self.min_ratio) * _done(step, start, max_steps)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _done(step: int, start: int, end: int) -> float:
    """The share of the way from `start` to `end` that lies behind `step`, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else float(step >= end)


def _check_steps(name: str, value: int) -> None:
    if value < 0:
        raise ConfigError(f"schedule.{name}={value} must not be negative")


def _check_ratio(value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"schedule.min_ratio={value} must lie between 0 and 1")
