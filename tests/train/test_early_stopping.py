"""When a run is called enough, and that a resumed one knows it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.train.best import Mode
from cantata.train.early_stopping import EarlyStopping, EarlyStoppingConfig
from tests.train.test_window import result


def config(**changes: Any) -> EarlyStoppingConfig:
    settings = {"metric": "eval/loss", "mode": Mode.min, "patience": 2, "min_delta": 0.1}
    return EarlyStoppingConfig(**(settings | changes))


class Run:
    def __init__(self, config: EarlyStoppingConfig | None) -> None:
        self.stop: Any = SimpleNamespace(received=False, enough=False)
        self.early = EarlyStopping(config, self.stop)

    def enough_after(self, losses: list[float | None]) -> list[bool]:
        seen = []
        for step, loss in enumerate(losses, start=1):
            extra = {} if loss == -1 else {"eval/loss": loss}
            self.early.after_step(replace(result(step), extra=extra))
            seen.append(self.stop.enough)
        return seen


def test_patience_counts_evaluations_in_a_row_that_gain_too_little() -> None:
    # -1 stands for a step without an evaluation.
    losses = [3.0, -1, 2.95, 2.0, 1.99, -1, 1.95]
    assert Run(config()).enough_after(losses) == [False] * 6 + [True]


def test_a_loss_that_is_not_finite_is_no_gain() -> None:
    run = Run(config())
    assert run.enough_after([None, None]) == [False, True]
    assert run.early.reason == "no finite eval/loss in 2 evaluations"


def test_the_reason_is_told_only_where_it_stopped() -> None:
    run = Run(config(patience=1))
    run.enough_after([3.0])
    assert run.early.reason is None
    run.enough_after([3.0, 3.0])
    assert run.early.reason == "no better eval/loss in 2 evaluations since step 1"


def test_without_a_config_it_never_stops() -> None:
    assert Run(None).enough_after([1.0, 2.0, 3.0, 4.0]) == [False] * 4


def test_a_resumed_run_stays_stopped_unless_patience_has_grown() -> None:
    run = Run(config())
    run.enough_after([1.0, 1.0, 1.0])
    state = json.loads(json.dumps(run.early.state_dict()))
    for settings, enough in ((config(), True), (config(patience=3), False), (None, False)):
        again = Run(settings)
        again.early.load_state_dict(state)
        assert again.stop.enough is enough
    grown = Run(config(patience=3))
    grown.early.load_state_dict(state)
    assert grown.enough_after([1.0]) == [True]


@pytest.mark.parametrize("changes", [{"patience": 0}, {"min_delta": -0.1}])
def test_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"train.early_stopping.{next(iter(changes))}="):
        config(**changes)
