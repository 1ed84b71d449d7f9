"""The helper itself: values by rank, and failures that say where."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.spawn import RanksError, run_ranks


def _sum(offset: int) -> tuple[int, float]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def _one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def _hangs() -> None:
    time.sleep(60)


def _aborted(marks: Path, times: int) -> int:
    if dist.get_rank() == 1 and len(list(marks.iterdir())) < times:
        (marks / str(time.monotonic_ns())).touch()
        os.abort()
    dist.barrier()
    return dist.get_rank()


def test_values_come_back_by_rank() -> None:
    assert run_ranks(_sum, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_a_failing_rank_is_reported_and_the_waiting_one_ended() -> None:
    with pytest.raises(RanksError, match="rank one is unwell"):
        run_ranks(_one_fails, 2)


def test_a_hang_is_ended_and_its_place_shown() -> None:
    # The server that ranks are forked from takes seconds to start.
    run_ranks(_sum, 1, 0)
    with pytest.raises(RanksError, match=r"(?s)did not finish in 3 s.*_hangs"):
        run_ranks(_hangs, 1, timeout=3.0)


def test_a_rank_that_native_code_aborts_gets_one_more_chance(tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    with pytest.warns(UserWarning, match=r"(?s)aborted a rank; once more: .*exit code -6.* in _aborted"):
        assert run_ranks(_aborted, 2, tmp_path / "once", 1) == [0, 1]
    (tmp_path / "twice").mkdir()
    with pytest.warns(UserWarning, match="once more"), pytest.raises(RanksError, match="exit code -6"):
        run_ranks(_aborted, 2, tmp_path / "twice", 2)
