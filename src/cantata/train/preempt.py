"""Stop politely: finish the step, save, and ask to be run again."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SIGUSR2 is what submitit asks SLURM to send."""


class StopRequest:
    """Reasons to stop that the loop reads between steps; `SIGNALS` become one.

    Those that a launcher held back while this process started (a blocked signal waits) are received now.
    """

    def __init__(self) -> None:
        self.received = False
        """A signal came, on this rank."""
        self.enough = False
        """Nothing is left to gain; set on every rank after the same step."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
