"""A batch that is not finite, a data worker that the kernel kills, and data that do not come."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from cantata.core.errors import RunError
from cantata.core.types import Batch, StepTotals
from cantata.data.order import Place
from cantata.data.stall import Marks, StallWatch
from cantata.train.engine import Loss
from cantata.train.loop import check_finite
from cantata.train.objectives import NextToken
from tests.distributed.spawn import run_ranks
from tests.drills.runs import SETTINGS, assert_undisturbed, started
from tests.recipes.runner import metrics, pretrain
from tests.recipes.test_bad_input import refusal
from tests.train.test_loop import batch


def test_a_batch_that_is_not_finite_stops_before_the_weights_change(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, sound = tmp_path / "run", [], NextToken.__call__

    def spoilt(self: NextToken, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
        calls.append(batch.describe())
        loss = sound(self, model, batch, totals)
        if len(calls) < 5:
            return loss
        return Loss(
            loss.value * float("nan"), {**loss.sums, "loss_sum": loss.sums["loss_sum"] * float("nan")}
        )

    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "__call__", spoilt)
        assert pretrain(out, *SETTINGS) == 1
    message = refusal(capfd)
    assert message.startswith("error: step 5: loss sum nan and gradient norm nan are not both finite")
    assert f"(loss sum nan on rank 0 in {calls[-1]})" in message
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert pretrain(out, *SETTINGS) == 0
    assert_undisturbed(out, whole)


def one_of_four(step: int) -> str:
    """What a rank says where the second micro-batch of rank 1 is not finite."""
    rank = dist.get_rank()
    batches = [batch(10 * rank + number) for number in range(2)]
    losses = [torch.tensor(float("nan") if (rank, number) == (1, 1) else 1.0) for number in range(2)]
    with pytest.raises(RunError) as caught:
        check_finite(float("nan"), 1.0, list(batches), losses, step)
    return str(caught.value)


@pytest.mark.distributed
def test_every_rank_names_the_rank_and_the_samples_that_were_not_finite() -> None:
    for said in run_ranks(one_of_four, 2, 5):
        assert "step 5: loss sum nan and gradient norm 1 are not both finite" in said
        assert "(loss sum nan on rank 1 in source:11)" in said


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_leaves_no_process(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with started(out, "data.num_workers=2") as run:
        run.wait_for_step(1)
        workers = run.workers()
        assert len(workers) == 2
        workers[0].kill()
        assert run.exit_codes() == [1]
        [line] = run.errors()
        assert line.startswith("error: a data worker ended (DataLoader worker (pid")
        assert "ran out of memory" in line
        assert "Traceback" not in run.text()
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert pretrain(out, *SETTINGS) == 0
    assert_undisturbed(out, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_do_not_come_are_named(
    tmp_path: Path,
    whole: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    reading, init = Marks.reading, StallWatch.__init__
    slept, told_once = set[tuple[int, int]](), tmp_path / "told"

    @contextmanager
    def slow(self: Marks, worker: int, place: Place) -> Iterator[None]:
        """The first sample of an iteration does not come before that is told."""
        with reading(self, worker, place):
            if (os.getpid(), id(self)) not in slept:
                slept.add((os.getpid(), id(self)))
                told_once.unlink(missing_ok=True)
                wait_for(told_once.exists)
            yield

    def noting(self: StallWatch, seconds: float | None, marks: Marks, warn: Callable[[str], None]) -> None:
        def note(line: str) -> None:
            warn(line)
            told_once.touch()

        init(self, seconds, marks, note)

    monkeypatch.setattr(StallWatch, "__init__", noting)
    monkeypatch.setattr(Marks, "reading", slow)
    out = tmp_path / "run"
    stalled = (f"data.num_workers={workers}", "data.stall_warning=0.4")
    assert pretrain(out, *SETTINGS, *stalled) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if "no training batch" in line]
    who = "data worker 0" if workers else "the trainer"
    line = rf"(warning: |  )no training batch for \S+ s: {who} has been reading sample \w+:\d+ for \S+ s"
    assert any(re.fullmatch(line, one) for one in told), told
    assert_undisturbed(out, whole)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
