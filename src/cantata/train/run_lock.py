"""One run at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

from cantata.core.errors import ConfigError

_FLOCK = "hhqqi"
"""`struct flock` of 64-bit Linux: type, whence, start, length, owner."""


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


def is_held(run_dir: Path) -> bool:
    """Whether a process holds the lock, as far as this machine can see; it is asked, not tried.

    A network file system without locks, and another host's local one, look free. Not for the process that
    holds it: closing any handle on the file gives up a POSIX lock.
    """
    try:
        with (run_dir / ".lock").open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:
        return False
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
