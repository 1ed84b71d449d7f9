"""Stop politely: finish the step, save, and ask to be run again."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Reasons to stop that the loop reads between steps; SIGTERM and SIGUSR1 become one."""

    def __init__(self) -> None:
        self.received = False
        """A signal came, on this rank."""
        self.enough = False
        """Nothing is left to gain; set on every rank after the same step."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
