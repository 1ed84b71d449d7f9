"""Says what a run waits for when its data do not come: which process reads which sample, and since when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray

from cantata.data.order import Place

_FIELDS = 3  # source, sample, since when; since 0 means that nothing is being read


class Marks:
    """What each process that reads is reading now, in memory that they share.

    The clock is the machine's monotonic one, which all processes read alike.

    Args:
        workers: that read; 0 where the trainer itself does.
        sources: names.
    """

    def __init__(self, workers: int, sources: Sequence[str]) -> None:
        self._has_workers = workers > 0
        self._sources = list(sources)
        self._values = RawArray("d", _FIELDS * max(workers, 1))

    @contextmanager
    def reading(self, worker: int, place: Place) -> Iterator[None]:
        """Mark a sample while `worker`, which calls this, reads it."""
        start = worker * _FIELDS
        self._values[start] = self._sources.index(place.source)
        self._values[start + 1] = place.index
        self._values[start + 2] = time.monotonic()
        yield
        # An error is the end of the worker's reading: there is nobody to clear it for.
        self._values[start + 2] = 0.0

    def describe(self, worker: int) -> str:
        """What a process is at, and since when."""
        who = f"data worker {worker}" if self._has_workers else "the trainer"
        source, sample, since = self._values[worker * _FIELDS : (worker + 1) * _FIELDS]
        if not since:
            return f"{who} is between two samples"
        name, seconds = self._sources[int(source)], time.monotonic() - since
        return f"{who} has been reading sample {name}:{int(sample)} for {seconds:.3g} s"


class StallWatch:
    """Watches one iteration of a loader, in the trainer's process.

    A thread warns once a wait lasts `seconds`, and again whenever it has become twice as long.

    Args:
        seconds: None warns of nothing.
        marks: what those who read are at.
        warn: takes the line; called in the thread.
    """

    def __init__(self, seconds: float | None, marks: Marks, warn: Callable[[str], None]) -> None:
        self._seconds = seconds
        self.marks = marks
        self._warn = warn
        self._since: float | None = None
        self._closed = threading.Event()
        self.worker = 0
        """Whose turn it is."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The trainer has nothing else to do than to wait."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Only after the workers were forked, which must not happen beside a thread."""
        if self._seconds is None:
            yield
            return
        thread = threading.Thread(target=self._watch, args=(self._seconds,), name="stall", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            thread.join()

    def _watch(self, seconds: float) -> None:
        known, due = None, seconds
        while not self._closed.wait(min(1.0, seconds / 4)):
            since = self._since
            if since is None:
                continue
            if since != known:
                known, due = since, seconds
            waited = time.monotonic() - since
            if waited >= due:
                self._warn(f"no training batch for {waited:.3g} s: {self.marks.describe(self.worker)}")
                due = 2 * waited
