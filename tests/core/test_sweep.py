"""Sweeps whose jobs run elsewhere: looked at as a whole before, and what their exit codes mean there."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from hydra._internal.utils import get_args_parser

from cantata.core import sweep
from cantata.core.errors import ConfigError, RunError
from cantata.core.sweep import JobFailed, RunDirs, check, end_job, in_job
from tests.recipes.runner import run

SLURM = ("-m", "hydra/launcher=slurm")


def check_lora(*arguments: str) -> None:
    check(get_args_parser().parse_args(list(arguments)), "lora")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("hydra/launcher=slurm",), "hydra/launcher=slurm starts the jobs of a sweep; add -m"),
        ((*SLURM, "seed=1,2"), "outputs/lora is the run directory of two jobs of this sweep"),
        ((*SLURM, "experiment=emoji_lora,emoij_lora"), "experiment=emoij_lora: no such option"),
        ((*SLURM, "train.max_stpes=1,2", "name=a-${seed}"), "train.max_stpes is not a known key"),
        ((*SLURM, "seed=[1"), "override 'seed=[1'"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_a_job_is_queued(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert run("lora", *arguments) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cantata\[slurm\]'"):
        check_lora(*SLURM, "seed=1,2", "name=s-${seed}")


def test_good_sweeps_and_other_launchers_pass(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\n")
    check_lora(*SLURM, "seed=1,2", "name=s-${seed}")
    check_lora("--config-dir", str(tmp_path), *SLURM, "experiment=mine,emoji_lora")
    check_lora("-m", "seed=1,2")
    check_lora("--cfg", "hydra", "hydra/launcher=slurm")
    check_lora("seed=1")


def test_run_directories_must_differ() -> None:
    run_dirs = RunDirs()
    run_dirs.add("a")
    run_dirs.add(Path("b"))
    with pytest.raises(ConfigError, match="out=b is the run directory of two jobs"):
        run_dirs.add("b")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A task of a job that submitit queued, with a stand-in for SLURM's command."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >{tmp_path}/called\n[ -z "$REFUSES" ] || {{ echo no >&2; exit 1; }}\n'
    )
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(sweep, "REQUEUE_SECONDS", 0)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "called"
    signal.signal(signal.SIGTERM, handler)


def test_a_process_knows_whether_it_is_a_job(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_job()
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    assert not in_job()


def test_a_job_that_is_done_returns_and_one_that_failed_says_so_where_the_sweep_waits(job: Path) -> None:
    end_job(0)
    for code in (1, 2):
        with pytest.raises(JobFailed) as caught:
            end_job(code)
        failure = cloudpickle.loads(cloudpickle.dumps(caught.value))
        assert failure.exit_code == code
        assert str(failure) == f"job 17 of the sweep ended with exit code {code}; its log says why"
    assert not job.exists()


def test_a_preempted_job_queues_again_by_its_first_rank(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="SLURM has not ended this job"):
        end_job(75)
    assert not job.exists()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunError, match="SLURM has not ended this job"):
        end_job(75)
    assert job.read_text() == "requeue 17\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_job_that_may_not_queue_again_fails(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSES", "1")
    with pytest.raises(RunError, match="scontrol requeue 17: no"):
        end_job(75)
