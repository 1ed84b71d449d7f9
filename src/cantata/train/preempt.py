"""Stop politely: finish the step, save, and ask to be run again."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Turns SIGTERM and SIGUSR1 into a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
