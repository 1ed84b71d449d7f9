"""Ending a run whose evaluations no longer get better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cantata.core.errors import ConfigError
from cantata.train.best import Best, BestConfig, Mode
from cantata.train.preempt import StopRequest

if TYPE_CHECKING:
    from cantata.train.loop import StepResult


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """The keys under `train.early_stopping`."""

    metric: str
    """A name of an evaluation's line, such as `eval/loss`."""
    mode: Mode
    """`min` or `max`."""
    patience: int
    """Evaluations in a row without a better value after which the run ends."""
    min_delta: float
    """A value counts as better only where it is by more than this."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"train.early_stopping.patience={self.patience} must be at least 1")
        if self.min_delta < 0:
            raise ConfigError(f"train.early_stopping.min_delta={self.min_delta} must be at least 0")


class EarlyStopping:
    """A listener that calls it enough, on all ranks after the same step: an evaluation is the same on each.

    The evaluation before the first step does not count. It hears of a step after the evaluation has.

    Args:
        config: None: the run goes on to its last step.
        stop: what the loop reads.
    """

    def __init__(self, config: EarlyStoppingConfig | None, stop: StopRequest) -> None:
        self._config = config
        self._stop = stop
        self._best = (
            Best(None)
            if config is None
            else Best(BestConfig(config.metric, config.mode), min_delta=config.min_delta)
        )
        self._stale = 0

    def after_step(self, result: StepResult) -> None:
        if self._config is None or self._config.metric not in result.extra:
            return
        better = self._best.update(result.progress.step, result.extra)
        self._stale = 0 if better else self._stale + 1
        self._decide()

    @property
    def reason(self) -> str | None:
        """Why the run ended early, where it did."""
        if not self._stop.enough or self._config is None:
            return None
        return (
            f"no better {self._config.metric} in {self._stale} evaluations since step {self._best.step}"
            if self._best.step is not None
            else f"no finite {self._config.metric} in {self._stale} evaluations"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"best": self._best.state_dict(), "stale": self._stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: one that was stopped early stays so, unless patience has grown."""
        self._best.load_state_dict(state["best"])
        self._stale = state["stale"] if self._best.step is not None else 0
        self._decide()

    def _decide(self) -> None:
        self._stop.enough = self._config is not None and self._stale >= self._config.patience
