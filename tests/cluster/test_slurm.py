"""The batch scripts and the Hydra launcher on a SLURM, two nodes: preempted, queued again, exact to a bit."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.local_slurm import LocalSlurm, local_slurm
from tests.recipes.runner import TINY_LORA, command, final, metrics, start, torchrun
from tests.recipes.test_pretrain import finish, same

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
STEPS = 80
PATIENCE = 600.0
"""Seconds until a test gives up; on idle cores nothing takes a twentieth of it."""
SETTINGS = ("model.weights=null", "schedule=constant", "accuracy.samples=0", f"train.max_steps={STEPS}")
VARIABLES = {
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT / "src"),
    "PROCESSES": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    with local_slurm(nodes=2) as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks without SLURM and without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(torchrun(2), out, *SETTINGS, stage="lora"), PATIENCE)
    return out


class Job:
    """A LoRA run of two ranks on two nodes, and its story."""

    def __init__(self, cluster: LocalSlurm, folder: Path, script: str, *overrides: str) -> None:
        self.out, self._cluster, self._folder, self._began = folder / "run", cluster, folder, time.monotonic()
        arguments = command(self.out, *SETTINGS, *overrides, stage="lora")
        script_file = str(SCRIPTS / f"{script}.sbatch")
        self.id = cluster.submit(
            "--nodes=2", "--ntasks-per-node=1", script_file, *arguments, cwd=folder, **VARIABLES
        )
        self.tell(f"submitted {script}.sbatch on 2 nodes")

    def tell(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] job {self.id}: {what}")

    @property
    def log(self) -> str:
        return "".join(file.read_text() for file in self._folder.glob("cantata-*.log"))

    @property
    def steps(self) -> int:
        return len(metrics(self.out))

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self._cluster.state(self.id) in ("PENDING", "CONFIGURING", "RUNNING"), self.log
            return self.steps >= step

        self._cluster.wait_for(reached, f"step {step} of job {self.id}", PATIENCE)
        self.tell(f"has made step {self.steps}")

    def wait_for_state(self, *states: str) -> str:
        ended = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED")

        def reached() -> bool:
            state = self._cluster.state(self.id)
            assert state in states or state not in ended, f"{state}: {self.log}\n{self._cluster.logs()}"
            return state in states

        self._cluster.wait_for(reached, f"job {self.id} is {' or '.join(states)}; {self.log}", PATIENCE)
        state = self._cluster.state(self.id)
        self.tell(state)
        return state

    def resume(self) -> None:
        """Wait until the job has queued again, then let it start without SLURM's two minutes."""
        self.wait_for_state("PENDING")
        self._cluster.start_now(self.id)
        self.tell(f"queued again, restarts {self._cluster.job(self.id)['Restarts']}")


def assert_equal(job: Job, whole: Path) -> None:
    assert [line["step"] for line in metrics(job.out)] == list(range(1, STEPS + 1)), "no gap and no repeat"
    assert [line["loss"] for line in metrics(job.out)] == [line["loss"] for line in metrics(whole)]
    same(final(job.out), final(whole))
    job.tell(f"{STEPS} steps without a gap or a repeat; weights equal to the run without interruption")


def test_a_preempted_job_queues_again_and_ends_bit_for_bit_alike(
    cluster: LocalSlurm, whole: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "torchrun", "checkpoint.every=0")
    job.wait_for_step(5)
    cluster.run("scancel", "--signal=USR1", job.id)
    job.tell("signalled USR1")
    job.resume()
    stopped = job.steps
    assert stopped < STEPS
    assert (job.out / "LATEST").read_text() == f"step-{stopped:08d}\n"
    assert "queued again 0 times" in job.log
    assert "ended with exit code 75" in job.log
    job.wait_for_state("COMPLETED")
    assert "queued again 1 times" in job.log
    assert "ended with exit code 0" in job.log
    assert f"resumed from step-{stopped:08d}" in " ".join(job.log.split())
    assert_equal(job, whole)


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    cluster: LocalSlurm, whole: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "torchrun", "checkpoint.every=5")
    job.wait_for_step(8)
    cluster.kill_node("n2")
    job.tell("killed -9: the slurmd of n2 and all that it had started")
    job.wait_for_state("PENDING")
    cluster.start_node("n2")
    job.resume()
    job.wait_for_state("COMPLETED")
    assert_equal(job, whole)


def test_tasks_without_torchrun_find_their_ranks_and_end_for_good_where_a_user_says_so(
    cluster: LocalSlurm, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "tasks", "checkpoint.every=0")
    job.wait_for_step(3)
    assert "2 ranks on cpu" in job.log
    cluster.run("scontrol", "update", f"jobid={job.id}", "requeue=0")
    cluster.run("scancel", "--signal=USR1", job.id)
    job.tell("signalled USR1, not to queue again")
    job.wait_for_state("FAILED")
    assert cluster.job(job.id)["ExitCode"] == "75:0"
    assert (job.out / "LATEST").read_text() == f"step-{job.steps:08d}\n"


def test_a_sweep_makes_each_job_a_job_of_slurm(cluster: LocalSlurm, tmp_path: Path) -> None:
    """One of the two is preempted on its way; the command waits for both."""
    swept = ("-m", "hydra/launcher=slurm", "seed=1,2", "name=seed-${seed}", "out=outputs/${name}")
    small = (*TINY_LORA, *SETTINGS, "checkpoint.every=0", "hydra.launcher.timeout_min=20")
    run = subprocess.Popen(
        [sys.executable, "-m", "cantata", "lora", *swept, *small],
        env=cluster.environment(**VARIABLES),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    outs = [tmp_path / "outputs" / f"seed-{seed}" for seed in (1, 2)]

    def going() -> bool:
        assert run.poll() is None, run.communicate()[0]
        return len(metrics(outs[0])) >= 3

    def queued_again() -> list[str]:
        return cluster.run("squeue", "-h", "-t", "PENDING", "-o", "%A").split()

    cluster.wait_for(going, "the sweep's first job trains", PATIENCE)
    first = cluster.run("squeue", "-h", "-r", "-o", "%i").split()
    cluster.run("scancel", "--signal=USR1", min(first))
    cluster.wait_for(lambda: bool(queued_again()), "it queues again", PATIENCE)
    stopped = len(metrics(outs[0]))
    assert (outs[0] / "LATEST").read_text() == f"step-{stopped:08d}\n"
    cluster.start_now(queued_again()[0])
    text, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, text
    for out in outs:
        assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    assert stopped < STEPS
