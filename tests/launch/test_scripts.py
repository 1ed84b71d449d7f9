"""The launch scripts: clean, clear about wrong use, and right about exit codes. Stand-ins play SLURM."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.system_tools import need

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
BATCH = [LAUNCH / "slurm" / "torchrun.sbatch", LAUNCH / "slurm" / "tasks.sbatch"]
JOB = {
    "SLURM_JOB_ID": "40017",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NODEID": "1",
    "PROCESSES": "4",
}

SRUN = """
printf '%s\\n' "$@" >"$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
[ -n "${CODE:-}" ] || exec "$@"
exit "$CODE"
"""
SCONTROL = """
echo "$*" >>"$CALLS/scontrol"
case $1-$2 in
show-node) printf 'NodeName=n%s\\n   NodeAddr=10.0.0.%s NodeHostName=n%s\\n' 1 1 1 2 2 2 ;;
show-job)
    echo "JobId=40017 JobName=x"
    echo "   JobState=${STATE:-RUNNING} Reason=None"
    echo "   EndTime=2030-01-01T00:00:00 Deadline=N/A"
    ;;
esac
"""
PROGRAM = """
printf '%s\\n' "$@" >"$CALLS/$(basename "$0")"
env >"$CALLS/environment"
cat /proc/$$/status >"$CALLS/status"
"""


class Stage:
    """A folder of stand-ins that write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.calls = folder / "calls"
        self._programs = folder / "bin"
        for path in (self.calls, self._programs):
            path.mkdir()
        stand_ins = {"srun": SRUN, "scontrol": SCONTROL}
        for name in ("srun", "scontrol", "python", "apptainer", "deepspeed"):
            file = self._programs / name
            file.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(stand_ins.get(name, PROGRAM)))
            file.chmod(0o755)

    def run(self, script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{self._programs}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(script), *arguments],
            env={"PATH": path, "HOME": "/", "CALLS": str(self.calls), "REQUEUE_SECONDS": "0", **variables},
            cwd=self._programs.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    def call(self, program: str) -> list[str]:
        """Arguments of the last call, or SLURM's commands one by one."""
        file = self.calls / program
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_remark(script: Path) -> None:
    need("shellcheck")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_batch_scripts_share_what_they_say_they_share() -> None:
    shared = [
        re.search(r"^# --- the same in both.*?^# --- each", file.read_text(), re.M | re.S) for file in BATCH
    ]
    assert shared[0] is not None
    assert shared[1] is not None
    assert shared[0][0] == shared[1][0]
    directives = [
        {line for line in file.read_text().splitlines() if line.startswith("#SBATCH")} for file in BATCH
    ]
    assert directives[0] - directives[1] == {"#SBATCH --ntasks-per-node=1"}
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR1@180"} <= directives[1]


def test_accelerates_files_ask_for_processes_alone() -> None:
    for file in (LAUNCH / "accelerate").iterdir():
        content = yaml.safe_load(file.read_text())
        assert (content["mixed_precision"], content["num_machines"]) == ("no", 1)


def test_torchrun_meets_at_the_first_nodes_address(stage: Stage) -> None:
    done = stage.run(BATCH[0], "recipes/lora.py", "name=a b", **JOB)
    assert (done.returncode, done.stderr) == (0, "")
    called = " ".join(stage.call("python"))
    assert called.startswith("-m cantata.torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d")
    assert (
        "--rdzv-endpoint 10.0.0.1:20017 --rdzv-id 40017 --rdzv-conf is_host=0 --local-addr 10.0.0.2" in called
    )
    assert stage.call("python")[-4:] == ["--max-restarts", "3", "recipes/lora.py", "name=a b"]
    assert "OMP_NUM_THREADS=1" in stage.call("environment")


def test_tasks_are_told_where_to_meet(stage: Stage) -> None:
    given = {**JOB, "SLURM_CPUS_PER_TASK": "6", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "5"}
    assert stage.run(BATCH[1], "-m", "cantata", "lora", "name=a b", **given).returncode == 0
    assert stage.call("python") == ["-m", "cantata", "lora", "name=a b"]
    told = {"MASTER_ADDR=10.0.0.1", "MASTER_PORT=20017", "OMP_NUM_THREADS=5"}
    assert told <= set(stage.call("environment"))
    assert stage.call("srun")[:4] == [
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--cpus-per-task=6",
        "--gpu-bind=none",
    ]


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.stem)
def test_a_signal_is_held_back_while_programs_start(script: Path, stage: Stage) -> None:
    """The mask of the program that takes the interpreter's place: bit 9 is SIGUSR1."""
    assert stage.run(script, "recipes/lora.py", **JOB).returncode == 0
    (blocked,) = [line.split()[1] for line in stage.call("status") if line.startswith("SigBlk")]
    assert int(blocked, 16) & 1 << 9


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("code", "given", "queued"),
    [
        ("75", {}, True),
        ("75", {"SLURM_RESTART_COUNT": "99"}, True),
        ("75", {"SLURM_RESTART_COUNT": "100"}, False),
        ("75", {"SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"}, False),
        ("75", {"STATE": "CANCELLED"}, False),
        *((code, {}, False) for code in ("0", "1", "2", "137", "143")),
    ],
)
def test_only_a_preempted_run_queues_again(
    script: Path, stage: Stage, code: str, given: dict[str, str], queued: bool
) -> None:
    done = stage.run(script, "recipes/lora.py", **JOB, CODE=code, **given)
    assert done.returncode == int(code)
    assert ("requeue 40017" in stage.call("scontrol")) == queued
    restarts = given.get("SLURM_RESTART_COUNT", "0")
    starts = f"job 40017: on n[1-2] until 2030-01-01T00:00:00, queued again {restarts} times"
    assert done.stdout.splitlines() == [starts, f"job 40017: ended with exit code {code}"]
    limit = "MAX_REQUEUES" in done.stderr
    assert limit == (code == "75" and not queued and "STATE" not in given)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.stem)
def test_containers_by_option(script: Path, stage: Stage, tmp_path: Path) -> None:
    assert (
        stage.run(script, "r.py", **JOB, CONTAINER="image.sqsh", CONTAINER_MOUNTS="/data:/d").returncode == 0
    )
    mounts = f"{tmp_path}:{tmp_path},/data:/d"
    wanted = [
        "--container-image=image.sqsh",
        f"--container-mounts={mounts}",
        f"--container-workdir={tmp_path}",
    ]
    assert set(wanted) <= set(stage.call("srun"))
    done = stage.run(script, "r.py", **JOB, CONTAINER="image.sif", CONTAINER_RUNTIME="apptainer")
    assert done.returncode == 0
    called = stage.call("apptainer")
    assert called[:6] == ["exec", "--bind", f"{tmp_path}:{tmp_path}", "--pwd", str(tmp_path), "image.sif"]
    assert called[6] == "bash"
    done = stage.run(script, "r.py", **JOB, CONTAINER="image.sif", CONTAINER_RUNTIME="docker")
    assert (done.returncode, done.stderr) == (
        2,
        "error: CONTAINER_RUNTIME=docker is neither pyxis nor apptainer\n",
    )


@pytest.mark.parametrize(
    ("script", "arguments", "given", "words"),
    [
        ("slurm/torchrun.sbatch", ["r.py"], {}, "this is no SLURM job"),
        ("slurm/tasks.sbatch", ["r.py"], {}, "this is no SLURM job"),
        ("slurm/torchrun.sbatch", [], JOB, "no recipe given"),
        ("slurm/tasks.sbatch", [], JOB, "no recipe given"),
        ("slurm/torchrun.sbatch", ["r.py"], {**JOB, "PROCESSES": ""}, "ask SLURM for GPUs"),
        ("slurm/torchrun.sbatch", ["r.py"], {**JOB, "SLURM_NTASKS": "8"}, "--ntasks-per-node=1"),
        ("slurm/tasks.sbatch", ["r.py"], {**JOB, "SLURM_GPUS_ON_NODE": "8"}, "--ntasks-per-node=8"),
        ("torchrun.sh", [], {}, "no recipe given"),
        ("torchrun.sh", ["r.py"], {"PROCESSES": "two"}, "PROCESSES=two is not a number"),
        ("torchrun.sh", ["r.py"], {"PROCESSES": "0"}, "no GPU found"),
        ("torchrun.sh", ["r.py"], {"PROCESSES": "2", "NODES": "2"}, "NODE_RANK"),
        ("torchrun.sh", ["r.py"], {"PROCESSES": "2", "NODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR"),
        ("deepspeed.sh", [], {}, "no recipe given"),
        ("deepspeed.sh", ["r.py"], {"PROCESSES": "0"}, "no GPU found"),
        ("deepspeed.sh", ["r.py"], {"HOSTFILE": "absent"}, "HOSTFILE=absent cannot be read"),
    ],
)
def test_wrong_use_is_one_line(
    stage: Stage, script: str, arguments: list[str], given: dict[str, str], words: str
) -> None:
    done = stage.run(LAUNCH / script, *arguments, **given)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*\n", done.stderr)
    assert words in done.stderr


def test_the_other_launchers_start_several_machines(stage: Stage, tmp_path: Path) -> None:
    several = {"PROCESSES": "8", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "RESTARTS": "1"}
    assert stage.run(LAUNCH / "torchrun.sh", "r.py", **several).returncode == 0
    assert " ".join(stage.call("python")) == (
        "-m cantata.torchrun --nnodes 2 --node-rank 1 --master-addr a --master-port 29500 --nproc-per-node 8 "
        "--max-restarts 1 r.py"
    )
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    assert stage.run(LAUNCH / "deepspeed.sh", "r.py", HOSTFILE="hosts", MASTER_PORT="1234").returncode == 0
    assert " ".join(stage.call("deepspeed")) == "--log_level warning --master_port 1234 --hostfile hosts r.py"
