"""kill -9 of everything and of one, while a step is made and while a checkpoint is written."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.drills.runs import SETTINGS, assert_undisturbed, started
from tests.recipes.runner import metrics, pretrain

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_all_killed_in_a_step_in_a_save_and_in_a_background_save(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with started(out) as run:
        run.block_save(6)
        run.wait_for_checkpoint(3)
        workers = run.workers()
        run.kill()
        # A worker finds out by itself that its trainer is gone.
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    with started(out, "checkpoint.background=false") as run:
        run.block_save(6)
        run.wait_for_step(6)
        run.kill()
        assert checkpoints(out) == ["step-00000003", "step-00000006.incomplete"]
    with started(out) as run:
        run.block_save(6)
        run.wait_for_step(8)
        run.kill()
        assert checkpoints(out) == ["step-00000003", "step-00000006.incomplete"]
    assert pretrain(out, *SETTINGS) == 0
    assert_undisturbed(out, whole)


def test_one_of_two_ranks_is_killed_and_the_other_says_so(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    with started(whole, world_size=2) as run:
        assert run.exit_codes() == [0, 0], run.text()
    with started(out, world_size=2) as run:
        run.wait_for_checkpoint(3)
        run.kill(1)
        assert run.exit_codes()[0] == 1
        [line] = run.errors()
        assert line.startswith("error: another rank was lost (Connection ")
        assert "Traceback" not in run.text()
        assert checkpoints(out) == ["step-00000003"]
    with started(out, world_size=2) as run:
        run.block_save(6)
        run.wait_for_step(7)
        run.kill()
    with started(out, world_size=2) as run:
        assert run.exit_codes() == [0, 0], run.text()
    assert_undisturbed(out, whole)
    assert len(metrics(out)) == 8
