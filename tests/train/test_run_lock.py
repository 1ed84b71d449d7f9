"""One run at a time. The lock of a killed process is tried in test_checkpoint.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cantata.train.run_lock import RunLock

TRY = """
import sys
from pathlib import Path
from cantata.core.errors import ConfigError
from cantata.train.run_lock import RunLock
try:
    RunLock(Path(sys.argv[1]))
except ConfigError as error:
    sys.exit(str(error))
"""


ASK = """
import sys
from pathlib import Path
from cantata.train.run_lock import is_held
sys.exit(int(is_held(Path(sys.argv[1]))))
"""


def attempt(run_dir: Path, code: str = TRY) -> subprocess.CompletedProcess[str]:
    """Take the lock, or ask for it, from another process: locks of one process never conflict."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, str(run_dir)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_another_process_is_refused_until_release(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    lock = RunLock(run_dir)
    refused = attempt(run_dir)
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert f"{run_dir} is in use by pid {os.getpid()} on " in refused.stderr
    lock.release()
    assert attempt(run_dir).returncode == 0


def test_a_forked_worker_that_outlives_the_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        lock.release()
        assert attempt(tmp_path).returncode == 0
    finally:
        os.close(write)
        os.waitpid(worker, 0)


def test_asking_takes_nothing(tmp_path: Path) -> None:
    assert attempt(tmp_path, ASK).returncode == 0, "no run was ever there"
    lock = RunLock(tmp_path)
    (tmp_path / ".lock").chmod(0o444)
    assert attempt(tmp_path, ASK).returncode == 1
    assert attempt(tmp_path, ASK).returncode == 1, "it is held still"
    lock.release()
    assert attempt(tmp_path, ASK).returncode == 0
