"""One run at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from cantata.core.errors import ConfigError


class RunLock:
    """Held from construction to `release`, or to the death of the process, however it dies."""

    def __init__(self, run_dir: Path) -> None:
        """Raises `ConfigError` where another process holds the lock."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / ".lock").open("a+")
        try:
            # A POSIX lock belongs to this process alone. flock would live on in data workers that
            # outlast a killed trainer by seconds, and refuse the restart.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"{run_dir} is in use by {owner}; wait for it, or choose another directory with out="
            ) from error
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()
