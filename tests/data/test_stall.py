"""What is said of data that do not come. Whole runs are in tests/drills."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import threading
import time
from collections.abc import Callable

from cantata.data.order import Place
from cantata.data.stall import Marks, StallWatch

SOURCES = ("photos", "texts")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_wait_is_told_when_it_is_due_and_again_when_it_is_twice_as_long() -> None:
    told: list[str] = []
    marks = Marks(0, SOURCES)
    watch = StallWatch(0.05, marks, told.append)
    with watch.watching(), watch.waiting(), marks.reading(0, Place("texts", 12, 3)):
        until(lambda: len(told) == 3)
    line = r"no training batch for (\S+) s: the trainer has been reading sample texts:12 for (\S+) s"
    waits = [[float(number) for number in re.fullmatch(line, one).groups()] for one in told]  # type: ignore[union-attr]
    assert waits[0][0] >= 0.05
    assert all(later >= 2 * sooner - 0.01 for (sooner, _), (later, _) in itertools.pairwise(waits))
    assert all(reading > 0 for _, reading in waits)


def test_reading_ahead_is_no_wait_and_each_wait_begins_anew() -> None:
    told: list[str] = []
    marks = Marks(0, SOURCES)
    watch = StallWatch(0.2, marks, told.append)
    with watch.watching():
        with marks.reading(0, Place("photos", 0, 0)):
            time.sleep(0.4)
        for _ in range(5):
            with watch.waiting():
                time.sleep(0.01)
    assert told == []


def test_the_mark_of_a_worker_process_is_seen() -> None:
    told: list[str] = []
    marks = Marks(2, SOURCES)
    watch = StallWatch(0.05, marks, told.append)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=read, args=(marks, context.Event()), daemon=True)
    process.start()
    watch.worker = 1
    with watch.watching(), watch.waiting():
        until(lambda: any("data worker 1 has been reading sample photos:7 for" in line for line in told))
        watch.worker = 0
        until(lambda: told[-1].endswith("data worker 0 is between two samples"))
    process.kill()
    process.join()


def read(marks: Marks, never: threading.Event) -> None:
    with marks.reading(1, Place("photos", 7, 0)):
        never.wait()


def test_without_a_limit_nobody_watches() -> None:
    threads = threading.active_count()
    with StallWatch(None, Marks(1, SOURCES), print).watching():
        assert threading.active_count() == threads
