"""Held-out losses: what they are, and on which steps' lines they stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError, RunError
from cantata.core.types import IMAGE, TEXT, Batch, StepTotals
from cantata.train.engine import Loss
from cantata.train.evaluate import Evaluation, evaluate
from cantata.train.metrics import Record
from cantata.train.objectives import NextToken
from tests.train.standin import StandIn, pack
from tests.train.test_window import result

LONG, SHORT = (TEXT, [3, 1, 4, 1, 5, 9]), (IMAGE, [2, 6])


def engine(model: nn.Module) -> Any:
    return SimpleNamespace(model=model)


@pytest.mark.parametrize("batches", [[[LONG, SHORT]], [[LONG], [SHORT]], [[SHORT], [], [LONG]]])
def test_every_target_weighs_the_same_however_batches_are_cut(batches: list[Any]) -> None:
    passes = [("a", [pack(samples, 2) for samples in batches])]
    record = evaluate(engine(StandIn()), NextToken(None), passes)
    assert record == {
        "eval/loss": pytest.approx(1.5 * (1 + 4 + 1 + 5 + 9 + 6) / 6),
        "eval/loss/text": pytest.approx(1.5 * 20 / 5),
        "eval/loss/image": pytest.approx(1.5 * 6),
        "eval/target_tokens": 6,
        "eval/loss/a": record["eval/loss"],
    }


def test_each_source_has_a_loss_of_its_own() -> None:
    passes = [("text", [pack([LONG])]), ("drawings", [pack([SHORT]), pack([])]), ("dropped", [])]
    record = evaluate(engine(StandIn()), NextToken(None), passes)
    # A source that is named as a modality leaves the modality its key.
    assert record["eval/loss/source/text"] == record["eval/loss/text"] == pytest.approx(1.5 * 20 / 5)
    assert record["eval/loss/drawings"] == pytest.approx(1.5 * 6)
    assert record["eval/loss"] == pytest.approx(1.5 * 26 / 6)
    assert "eval/loss/dropped" not in record


def test_the_model_evaluates_without_gradients_and_trains_on_afterwards() -> None:
    model = StandIn()

    class Watch(NextToken):
        def __call__(self, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
            assert not model.training
            assert not torch.is_grad_enabled()
            return super().__call__(model, batch, totals)

    evaluate(engine(model), Watch(None), [("a", [pack([LONG])])])
    assert model.training
    assert model.weight.grad is None


def test_nothing_left_to_evaluate_is_an_error_that_names_the_keys() -> None:
    with pytest.raises(RunError, match=r"every held-out sample was left out .*train\.eval_every=0"):
        evaluate(engine(StandIn()), NextToken(None), [("a", [])])


class Run:
    """Evaluations whose loss is their number, and what was told of them."""

    def __init__(self, every: int, max_steps: int, wanted: dict[str, str] | None = None) -> None:
        self.told: list[int] = []
        self.evaluation = Evaluation(self._run, every, max_steps, wanted or {})

    def _run(self, step: int) -> Record:
        self.told.append(step)
        return {"eval/loss": float(len(self.told) - 1), "eval/loss/text": 0.5}

    def line(self, step: int) -> Record:
        finished = result(step)
        self.evaluation.after_step(finished)
        return finished.extra


@pytest.mark.parametrize(
    ("every", "max_steps", "expected"), [(2, 5, [2, 4, 5]), (3, 6, [3, 6]), (9, 4, [4]), (0, 4, [])]
)
def test_it_runs_every_so_many_steps_and_after_the_last(
    every: int, max_steps: int, expected: list[int]
) -> None:
    run = Run(every, max_steps)
    lines = {step: run.line(step) for step in range(1, max_steps + 1)}
    assert run.told == [step for step, line in lines.items() if line] == expected


def test_the_first_line_carries_the_losses_of_the_untrained_model() -> None:
    run = Run(2, 4)
    run.evaluation.before_first_step()
    assert run.told == [0]
    assert run.line(1) == {"eval/initial/loss": 0.0, "eval/initial/loss/text": 0.5}
    assert run.line(2) == {"eval/loss": 1.0, "eval/loss/text": 0.5}
    assert (run.evaluation.first_loss, run.evaluation.last_loss) == (0.0, 1.0)


def test_a_run_that_never_evaluates_does_not_before_the_first_step_either() -> None:
    run = Run(0, 4)
    run.evaluation.before_first_step()
    assert run.told == []
    assert run.line(1) == {}
    assert run.evaluation.first_loss is None


def test_a_metric_that_the_run_goes_by_must_be_there() -> None:
    Run(2, 4, {"checkpoint.best.metric": "eval/loss/text"}).evaluation.before_first_step()
    run = Run(2, 4, {"checkpoint.best.metric": "eval/los"})
    with pytest.raises(
        ConfigError, match=r"checkpoint\.best\.metric=eval/los is no value .* nearest: eval/loss"
    ):
        run.evaluation.before_first_step()


def test_a_resumed_run_does_not_know_how_it_began() -> None:
    run = Run(2, 4)
    run.line(4)
    assert (run.evaluation.first_loss, run.evaluation.last_loss) == (None, 0.0)
