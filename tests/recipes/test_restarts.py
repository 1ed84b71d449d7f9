"""What dies comes back, what is asked to stop stops: under torchrun, with two ranks, and exactly."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from cantata.core.errors import PREEMPTED
from tests.recipes.runner import final, kill, metrics, start, torchrun
from tests.recipes.test_pretrain import finish, same, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAUNCHER = ["-m", "cantata.torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
STEPS = 400
PATIENCE = 600.0
SETTINGS = (f"train.max_steps={STEPS}", "checkpoint.every=5", "schedule=constant")


def worker(launcher: subprocess.Popen[str], rank: int) -> int:
    """The pid of the process with this rank, of those that live."""
    for child in psutil.Process(launcher.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no rank {rank}")


def test_a_dead_worker_is_replaced_and_one_signalled_rank_stops_all(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    run = start(LAUNCHER, out, *SETTINGS)
    request.addfinalizer(lambda: kill(run) if run.poll() is None else None)
    wait_for(run, lambda: len(metrics(out)) >= 7, PATIENCE)
    os.kill(worker(run, 1), signal.SIGKILL)
    killed_at = len(metrics(out))

    starts = out / "logs" / "rank-0.log"
    wait_for(run, lambda: starts.read_text().count("stopped by") == 1, PATIENCE)
    wait_for(run, lambda: len(metrics(out)) >= killed_at + 7, PATIENCE)
    os.kill(worker(run, 1), signal.SIGUSR1)
    text, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == PREEMPTED, text
    stopped_at = len(metrics(out))
    assert stopped_at < STEPS
    assert (out / "LATEST").read_text() == f"step-{stopped_at:08d}\n"

    more = (*SETTINGS[1:], f"train.max_steps={stopped_at + 2}")
    finish(start(torchrun(2), out, *more), PATIENCE)
    finish(start(torchrun(2), tmp_path / "whole", *more), PATIENCE)
    assert [line["step"] for line in metrics(out)] == list(range(1, stopped_at + 3))
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in metrics(tmp_path / "whole")]
    same(final(out), final(tmp_path / "whole"))
