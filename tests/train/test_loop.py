"""The loop, with an engine that only remembers what it was asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import RunError
from cantata.core.types import IGNORE_INDEX, TEXT, Batch, Images, RowInfo, Segments, StepTotals
from cantata.parallel.recompute import Recompute
from cantata.train.config import LanguageTrainConfig
from cantata.train.engine import Loss
from cantata.train.loop import Progress, StepResult, fit
from cantata.train.watchdog import Watchdog

CONFIG = LanguageTrainConfig(
    max_steps=3,
    micro_batch_size=1,
    gradient_accumulation_steps=2,
    sequence_length=4,
    clip_grad_norm=1.0,
    log_every=1,
    eval_every=0,
    expert_every=0,
    expert_load_warning=None,
    early_stopping=None,
    neftune_alpha=0.0,
    recompute=Recompute.none,
    compile=False,
    hang_seconds=None,
)


def batch(number: int, tokens: int = 4, targets: int = 3) -> Batch:
    empty = torch.empty(0, dtype=torch.int64)
    labels = torch.full((4,), IGNORE_INDEX)
    labels[:targets] = 1
    return Batch(
        input_ids_T=torch.ones(4, dtype=torch.int64),
        labels_T=labels,
        position_ids_T=torch.arange(4),
        modality_ids_T=torch.full((4,), TEXT),
        target_index_N=torch.arange(targets),
        target_modality_N=torch.zeros(targets, dtype=torch.int64),
        samples=Segments((tokens,)),
        images=Images(torch.empty((0, 3)), empty, Segments(()), Segments(()), empty),
        rows=(RowInfo(0, (f"source:{number}",), {}),),
    )


def batches(targets: int = 3) -> Iterator[Batch]:
    number = 0
    while True:
        yield batch(number, targets=targets)
        number += 1


class FakeEngine:
    """Returns a loss sum per micro-batch and remembers the calls."""

    def __init__(self, loss: float = 2.0, norm: float = 0.5) -> None:
        self.loss, self.norm = loss, norm
        self.calls: list[Any] = []

    def forward_backward(
        self, batch: Batch, objective: Any, totals: StepTotals, *, last: bool
    ) -> dict[str, Tensor]:
        self.calls.append(("micro", batch.describe(), totals, last))
        return objective(nn.Identity(), batch, totals).sums

    def gradient_norm(self, max_norm: float | None) -> float:
        self.calls.append(("norm", max_norm))
        return self.norm

    def step(self, learning_rate_factor: float) -> None:
        self.calls.append(("step", learning_rate_factor))


class FakeObjective:
    def __init__(self, loss: float) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
        value = torch.tensor(self.loss)
        return Loss(value, {"loss_sum": value})


class Recorder:
    def __init__(self) -> None:
        self.results: list[StepResult] = []

    def after_step(self, result: StepResult) -> None:
        self.results.append(result)


def run(
    engine: FakeEngine, config: LanguageTrainConfig = CONFIG, start: Progress | None = None, **settings: Any
) -> Any:
    recorder = Recorder()
    stop = settings.pop("stop", SimpleNamespace(received=False, enough=False))
    end = fit(
        engine,  # type: ignore[arg-type]
        FakeObjective(engine.loss),
        settings.pop("data", batches()),
        lambda step, max_steps: 1.0 / (step + 1),
        config,
        [recorder, *settings.pop("listeners", [])],
        start or Progress(),
        stop,
        settings.pop("watchdog", Watchdog(None, Path(), 0)),
    )
    return end, recorder.results


def test_a_step_counts_all_micro_batches_before_the_first_one_runs() -> None:
    engine = FakeEngine()
    end, results = run(engine, replace(CONFIG, max_steps=1))
    totals = StepTotals(tokens=8, target_tokens=6, target_weight=6)
    assert engine.calls == [
        ("micro", "source:0", totals, False),
        ("micro", "source:1", totals, True),
        ("norm", 1.0),
        ("step", 1.0),
    ]
    assert end == Progress(step=1, tokens=8, target_tokens=6)
    assert results[0].sums["loss_sum"].item() == 4.0
    assert results[0].grad_norm == 0.5


def test_resuming_goes_on_with_the_step_and_the_schedule() -> None:
    engine = FakeEngine()
    end, results = run(engine, start=Progress(step=2, tokens=100, target_tokens=50))
    assert [result.learning_rate_factor for result in results] == [1 / 3]
    assert end == Progress(step=3, tokens=108, target_tokens=56)


def test_a_finished_run_does_nothing() -> None:
    engine = FakeEngine()
    end, results = run(engine, start=Progress(step=3))
    assert (end.step, results, engine.calls) == (3, [], [])


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 0.5), (2.0, float("inf")), (float("inf"), float("nan"))]
)
def test_what_is_not_finite_stops_before_the_update_and_names_the_batch(loss: float, norm: float) -> None:
    engine = FakeEngine(loss, norm)
    named = "loss is; the step's samples: source:0; source:1"
    if not math.isfinite(loss):
        named = f"loss sum {loss:g} on rank 0 in source:0; loss sum {loss:g} on rank 0 in source:1"
    with pytest.raises(RunError, match=rf"step 1: .*not both finite \(.*{named}\)"):
        run(engine)
    assert not any(call[0] == "step" for call in engine.calls)


def test_a_step_without_targets_is_an_error_that_names_the_batch() -> None:
    engine = FakeEngine()
    with pytest.raises(
        RunError, match=r"step 1: no token of the batch carries a target \(source:0; source:1\)"
    ):
        run(engine, data=batches(targets=0))
    assert engine.calls == []


def test_enough_is_enough_after_the_step_that_says_so() -> None:
    engine = FakeEngine()
    stop = SimpleNamespace(received=False, enough=False)

    class Enough:
        def after_step(self, result: StepResult) -> None:
            stop.enough = True

    end, results = run(engine, stop=stop, listeners=[Enough()])
    assert (end.step, len(results)) == (1, 1)
    assert run(engine, stop=stop, start=end) == (end, [])


def test_a_stop_request_ends_after_the_step_that_sees_it() -> None:
    engine = FakeEngine()
    stop = SimpleNamespace(received=False, enough=False)

    class Interrupt:
        def after_step(self, result: StepResult) -> None:
            stop.received = True

    end, results = run(engine, stop=stop, listeners=[Interrupt()])
    # The request came after step 1 had asked for it, so step 2 is the one that sees it.
    assert end.step == 2
    assert len(results) == 2
