"""A batch that is not finite, a data worker that the kernel kills, and data that do not come."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from cantata.core.errors import RunError
from cantata.core.types import Batch, StepTotals
from cantata.data.reading import Reader
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
    read, slept = Reader.read, set[int]()

    def slow(self: Reader, name: str, index: int, epoch: int = 0) -> Any:
        """The first training sample that a process reads takes its time."""
        if self.key == "data.sources" and os.getpid() not in slept:
            slept.add(os.getpid())
            time.sleep(1.5)
        return read(self, name, index, epoch)

    monkeypatch.setattr(Reader, "read", slow)
    out = tmp_path / "run"
    stalled = (f"data.num_workers={workers}", "data.stall_warning=0.4")
    assert pretrain(out, *SETTINGS, *stalled) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if "no training batch" in line]
    who = "data worker 0" if workers else "the trainer"
    line = rf"(warning: |  )no training batch for \S+ s: {who} has been reading sample \w+:\d+ for \S+ s"
    assert any(re.fullmatch(line, one) for one in told), told
    assert_undisturbed(out, whole)
