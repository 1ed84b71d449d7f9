"""Sweeps whose jobs run elsewhere: `-m hydra/launcher=slurm` makes each a SLURM job, by submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from cantata.core.compose import COMPOSITION_ERRORS, compose, explain
from cantata.core.dist import find_process
from cantata.core.errors import PREEMPTED, CantataError, ConfigError, RunError
from cantata.core.locate import configs_dir

LAUNCHER, PLUGIN = "hydra/launcher", "hydra_plugins.hydra_submitit_launcher"
REQUEUE_SECONDS = 600
"""How long SLURM may take to end a job that is to queue again."""


class RunDirs:
    """The run directories of a sweep's jobs, which must differ."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def add(self, out: object) -> None:
        """Raises `ConfigError` where a job before has the same."""
        if str(out) in self._seen:
            raise ConfigError(
                f"out={out} is the run directory of two jobs of this sweep; put what is swept into the name, "
                "for example 'name=lr-${optimizer.lr}'"
            )
        self._seen.add(str(out))


def check(given: Namespace, config_name: str) -> None:
    """Look at a sweep for a launcher as a whole, before any of its jobs is queued.

    Args:
        given: Hydra's own arguments, parsed.

    Raises:
        ConfigError: no sweep is asked for, the launcher is not installed, a job's configuration does not
            compose, or two jobs share a run directory.
    """
    chosen = [text.partition("=")[2] for text in given.overrides if text.partition("=")[0] == LAUNCHER]
    if not chosen or chosen[-1] == "basic" or given.cfg or given.info:
        return
    if not given.multirun:
        raise ConfigError(f"{LAUNCHER}={chosen[-1]} starts the jobs of a sweep; add -m")
    if chosen[-1] == "slurm" and not _installed():
        raise ConfigError(
            f"{LAUNCHER}=slurm needs packages that are not installed: pip install 'cantata[slurm]'"
        )
    run_dirs = RunDirs()
    for overrides in _jobs(given.overrides, config_name):
        more = [f"hydra.searchpath=[file://{Path(given.config_dir).absolute()}]"] if given.config_dir else []
        run_dirs.add(compose(config_name, [*overrides, *more]).node.out)


def in_job() -> bool:
    """Whether this process is a task of a job that submitit queued."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def end_job(code: int) -> None:
    """What a job's exit code means to SLURM and to the process that waits for the sweep.

    After 75 the job queues again, and this does not return. Raises `JobFailed` for all codes but 0.
    """
    if code == PREEMPTED:
        _queue_again()
    if code:
        raise JobFailed(code, os.environ.get("SLURM_JOB_ID", "?"))


class JobFailed(CantataError):
    """A job of a sweep that ended with another exit code than 0; it said why in its own log."""

    def __init__(self, code: int, job: str) -> None:
        super().__init__(code, job)
        self.exit_code = code
        self._job = job

    def __str__(self) -> str:
        return f"job {self._job} of the sweep ended with exit code {self.exit_code}; its log says why"


def _installed() -> bool:
    try:
        return find_spec(PLUGIN) is not None and find_spec("submitit") is not None
    except ModuleNotFoundError:
        return False


def _jobs(overrides: Sequence[str], config_name: str) -> list[list[str]]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, None)
    except COMPOSITION_ERRORS as error:
        raise explain(error, config_name, overrides, str(configs_dir())) from error
    return [list(job) for batch in batches for job in batch]


def _queue_again() -> None:
    # A result would tell whoever waits for the sweep that the job is done, so SLURM must end this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if find_process().rank == 0:
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(command)}: {done.stderr.strip()}")
    time.sleep(REQUEUE_SECONDS)
    raise RunError(f"SLURM has not ended this job, which is to queue again, in {REQUEUE_SECONDS} s")
