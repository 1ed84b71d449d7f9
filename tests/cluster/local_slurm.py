"""A SLURM of several nodes on this machine, for as long as a test module runs: munge, slurmctld, slurmds.

No systemd, no files outside a temporary folder, everything on 127.0.0.1 and ports that were free. Names of
nodes do not resolve, as on some real clusters; accounting is off, so there is no `sacct`.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.system_tools import need

ADDRESS = "127.0.0.1"
PR_SET_PDEATHSIG = 1
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

CONF = """
ClusterName=cantata
SlurmctldHost={host}({address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=10
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
PropagateResourceLimits=NONE
PartitionName=all Nodes=n[1-{nodes}] Default=YES MaxTime=30 State=UP
"""


class LocalSlurm:
    """A running cluster: its commands, and what only a test does to one."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._write_conf(nodes)

    def environment(self, **more: str) -> dict[str, str]:
        """This process' variables, with the cluster to speak to."""
        return {**os.environ, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self._conf), **more}

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The output of one of SLURM's commands; raises where it fails."""
        done = subprocess.run(
            command,
            env=env or self.environment(),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}"
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """`sbatch` with these arguments, in a folder; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, env=self.environment(**variables), cwd=cwd)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: `JobState`, `Restarts`, `ExitCode`, `Reason`, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def start_now(self, job: str) -> None:
        """A job that was queued again waits two minutes otherwise."""
        # Nodes revoke its credentials by the second, and would refuse those of a start in the same one.
        time.sleep(2)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not in {seconds:.0f} s: {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of every daemon, for a message."""
        files = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(_tail(file, 15)) for file in files)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its slurmd and all that it has started, at once."""
        daemon = self._daemons.pop(name)
        managers = [process for process in psutil.process_iter() if self._manages(process, name)]
        _kill(
            [psutil.Process(daemon.pid), *managers, *(child for one in managers for child in _children(one))]
        )
        daemon.wait()

    def start_node(self, name: str) -> None:
        (self._folder / f"spool.{name}").mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-c", "-N", name, "-f", str(self._conf))

    def start(self) -> None:
        """Returns when every node is idle."""
        munge = self._folder / "munge"
        socket_file, key = munge / "socket", munge / "key"
        munge.mkdir()
        munge.chmod(0o755)
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = [f"--{kind}-file={munge / kind}" for kind in ("pid", "seed")]
        log = f"--log-file={self._folder / 'munged.log'}"
        # --force: it runs as any user, in a folder below one that all may write.
        self._start(
            "munged",
            "munged",
            "--force",
            "--foreground",
            f"--key-file={key}",
            f"--socket={socket_file}",
            log,
            *files,
        )
        self.wait_for(socket_file.exists, "munge answers", 20)
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self._conf))
        for name in self.nodes:
            self.start_node(name)
        self.wait_idle(30)

    def wait_idle(self, seconds: float) -> None:
        def idle() -> bool:
            done = subprocess.run(
                ["sinfo", "-h", "-t", "idle", "-o", "%D"],
                env=self.environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            return done.stdout.strip() == str(len(self.nodes))

        self.wait_for(idle, "all nodes are idle", seconds)

    def stop(self) -> None:
        """End every daemon and every process of every job, whatever state they are in."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(2)
        _kill(self._processes())
        for daemon in self._daemons.values():
            daemon.wait()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SYSTEM_PATH)
        assert path is not None
        with (self._folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [path, *arguments],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _processes(self) -> list[psutil.Process]:
        """What jobs have started, and what looks after them; neither ends with its daemon."""
        return [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid()
            if self._manages(process) or _variable(process, "SLURM_CONF") == str(self._conf)
        ]

    def _manages(self, process: psutil.Process, node: str = "*") -> bool:
        """Whether this is a slurmstepd, which hides its environment but writes to its node's log."""
        with suppress(psutil.Error):
            if process.name().startswith("slurmstepd"):
                logs = self._folder.glob(f"slurmd.{node}.log")
                return not {file.path for file in process.open_files()}.isdisjoint(map(str, logs))
        return False

    def _write_conf(self, nodes: int) -> None:
        self._conf = self._folder / "slurm.conf"
        (self._folder / "state").mkdir()
        controller_port, *ports = _free_ports(nodes + 1)
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(
            host=host,
            address=ADDRESS,
            controller_port=controller_port,
            user=getpass.getuser(),
            folder=self._folder,
            nodes=nodes,
        )
        for name, port in zip(self.nodes, ports, strict=True):
            text += (
                f"NodeName={name} NodeHostname={host} NodeAddr={ADDRESS} Port={port} CPUs=4 RealMemory=4000\n"
            )
        self._conf.write_text(text)


@contextmanager
def local_slurm(nodes: int = 2) -> Iterator[LocalSlurm]:
    """A cluster for the block; skips the test where its programs are absent."""
    need(*PROGRAMS)
    with ExitStack() as closing:
        # Sockets have short paths, so not below pytest's own folder.
        folder = closing.enter_context(
            tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        )
        Path(folder).chmod(0o755)
        cluster = LocalSlurm(Path(folder), nodes)
        closing.callback(cluster.stop)
        cluster.start()
        yield cluster


def _die_with_parent() -> None:
    """A test run that is killed stops nothing itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as closing:
        probes = [closing.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((ADDRESS, 0))
        return [probe.getsockname()[1] for probe in probes]


def _variable(process: psutil.Process, name: str) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get(name)
    return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        children: list[psutil.Process] = process.children(recursive=True)
        return children
    return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def _tail(file: Path, lines: int) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-lines:]
