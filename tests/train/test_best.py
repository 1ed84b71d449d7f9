"""What counts as the best evaluation so far."""

from __future__ import annotations

import json

import pytest

from cantata.train.best import Best, BestConfig, Mode

LOSS, ACCURACY = BestConfig("eval/loss", Mode.min), BestConfig("eval/accuracy", Mode.max)


@pytest.mark.parametrize(
    ("config", "values", "better"),
    [
        (LOSS, [3.0, 2.0, 2.0, 2.5, 1.0], [True, True, False, False, True]),
        (ACCURACY, [0.1, 0.1, 0.4, 0.3], [True, False, True, False]),
        (LOSS, [float("nan"), None, 5.0, float("inf")], [False, False, True, False]),
        (None, [1.0], [False]),
    ],
)
def test_only_more_than_the_best_is_better(
    config: BestConfig | None, values: list[float | None], better: list[bool]
) -> None:
    best = Best(config)
    name = "eval/loss" if config is None else config.metric
    assert [best.update(step, {name: value}) for step, value in enumerate(values)] == better


def test_a_small_gain_is_none() -> None:
    best = Best(LOSS, min_delta=0.5)
    assert [best.update(step, {"eval/loss": value}) for step, value in enumerate([3.0, 2.5, 2.4])] == [
        True,
        False,
        True,
    ]


def test_a_step_without_an_evaluation_changes_nothing() -> None:
    best = Best(LOSS)
    assert not best.update(1, {"loss": 0.5})
    assert best.value is None


def test_its_state_goes_on_in_another_process_but_not_with_another_metric() -> None:
    best = Best(LOSS)
    best.update(4, {"eval/loss": 2.0})
    state = json.loads(json.dumps(best.state_dict()))
    again, other = Best(LOSS), Best(ACCURACY)
    again.load_state_dict(state)
    other.load_state_dict(state)
    assert (again.value, again.step) == (2.0, 4)
    assert not again.update(5, {"eval/loss": 2.0})
    assert other.value is None
