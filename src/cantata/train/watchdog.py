"""A run that stands still says where, on every rank, and ends: no collective waits in silence for long."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cantata.core.errors import CantataError

GRACE_SHARE, LEAST_GRACE = 0.1, 2.0
"""Share of the bound, and seconds, between a rank's stacks and its end: the others' clocks run out a little
later, and once the first rank is gone the launcher ends the rest."""
FIRST_STEP = 2.0
"""Times the bound that the first step may take: it compiles, and meets the other ranks for the first time."""


class Watchdog:
    """Ends the process, with exit code 1, once a step has stood still for too long.

    The loop calls `beat` wherever a step moves on, and `rest` where it ends: evaluations and saves take what
    they take. When nothing has moved for `seconds`, the stacks of all threads go to the rank's log; when
    nothing moves for a tenth longer, the process ends, whatever native code its main thread waits in. A
    process that was stopped (SIGSTOP, `scontrol suspend`) has not stood still.

    Args:
        seconds: None watches nothing.
        log: the rank's log file, in a folder that exists.
        rank: for the messages.
        end: ends the process without waiting for anything.
    """

    def __init__(
        self, seconds: float | None, log: Path, rank: int, end: Callable[[int], None] = os._exit
    ) -> None:
        self._bound = seconds
        self._log = log
        self._rank = rank
        self._end = end
        self._beats = 0
        self._resting = True
        self._in_first_step = True
        self._closed = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, args=(seconds,), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The step has begun, or has moved on."""
        self._beats += 1
        self._resting = False

    def rest(self) -> None:
        """The step is over; what follows is not watched."""
        self._resting = True
        self._in_first_step = False

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self, seconds: float) -> None:
        tick = min(1.0, seconds / 20)
        seen, still, told, last = 0, 0.0, False, time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            # A long pause of this thread is one of the whole process.
            still, last = still + min(now - last, 2 * tick), now
            if self._resting or self._beats != seen:
                seen, still, told = self._beats, 0.0, False
            bound = seconds * (FIRST_STEP if self._in_first_step else 1.0)
            if still >= bound and not told:
                self._tell(still)
                told = True
            if still >= bound + max(GRACE_SHARE * seconds, LEAST_GRACE):
                self._end(CantataError.exit_code)
                return

    def _tell(self, still: float) -> None:
        """Write at once, past loggers and the terminal's lock: whoever holds one may be what hangs."""
        message = (
            f"error: rank {self._rank}: the step has stood still for {still:.0f} s (train.hang_seconds); "
            f"where every thread stands is in {self._log}; unless it moves on the run ends\n"
        )
        with contextlib.suppress(OSError), self._log.open("a") as log:
            log.write(message)
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
