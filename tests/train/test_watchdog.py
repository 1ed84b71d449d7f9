"""A step that stands still is told of and ended; what only takes long is left alone."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cantata.train import watchdog
from cantata.train.watchdog import Watchdog
from tests.recipes.runner import command, metrics, start_process, torchrun

BOUND = 0.3


class Ended:
    """Stands in for the end of the process."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.event.set()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LEAST_GRACE", 0.1)


@contextmanager
def watching(tmp_path: Path, seconds: float | None = BOUND) -> Iterator[tuple[Watchdog, Ended, Path]]:
    log, ended = tmp_path / "rank-3.log", Ended()
    dog = Watchdog(seconds, log, 3, ended)
    try:
        yield dog, ended, log
    finally:
        dog.close()


def stand_still(ended: Ended) -> None:
    assert ended.event.wait(30)


def test_a_step_that_stands_still_ends_the_run_and_its_stack_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with watching(tmp_path) as (dog, ended, log):
        dog.beat()
        stand_still(ended)
    assert ended.code == 1
    told = log.read_text()
    assert told.startswith("error: rank 3: the step has stood still for")
    assert "in stand_still" in told
    assert f"in {log}" in capfd.readouterr().err


def test_the_first_step_may_take_twice_as_long(tmp_path: Path) -> None:
    took = []
    for first in (True, False):
        with watching(tmp_path) as (dog, ended, _):
            dog.beat()
            if not first:
                dog.rest()
                dog.beat()
            began = time.monotonic()
            stand_still(ended)
            took.append(time.monotonic() - began)
    assert took[0] > 2 * BOUND
    assert took[1] > BOUND


def grow_old(dog: Watchdog) -> None:
    for _ in range(20):
        dog.beat()
        time.sleep(BOUND / 6)


def evaluate(dog: Watchdog) -> None:
    dog.beat()
    dog.rest()
    time.sleep(BOUND * 3)


@pytest.mark.parametrize("use", [grow_old, evaluate])
def test_what_moves_or_rests_is_left_alone(tmp_path: Path, use: Callable[[Watchdog], None]) -> None:
    with watching(tmp_path) as (dog, ended, log):
        use(dog)
        assert (ended.code, log.exists()) == (None, False)


def test_a_step_that_moves_on_after_all_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LEAST_GRACE", 30.0)
    with watching(tmp_path) as (dog, ended, log):
        for times in (1, 2):
            dog.rest()
            dog.beat()
            end = time.monotonic() + 30
            while not log.exists() or log.read_text().count("stood still") < times:
                assert time.monotonic() < end
                time.sleep(0.02)
        assert ended.code is None


def test_a_process_that_was_stopped_has_not_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda real=time.monotonic: real() + away)
    with watching(tmp_path, 60.0) as (dog, ended, log):
        dog.beat()
        time.sleep(0.2)
        away = 3600.0
        time.sleep(2.5)
        assert (ended.code, log.exists()) == (None, False)


def test_nothing_is_watched_without_a_bound(tmp_path: Path) -> None:
    before = threading.active_count()
    with watching(tmp_path, None) as (dog, _, _):
        dog.beat()
        assert threading.active_count() == before


HANGS = textwrap.dedent(
    """
    import os, runpy, sys, time
    from cantata.data.loader import Loader

    make = Loader.__iter__

    def asleep_in_the_loader():
        time.sleep(600)

    def batches(self):
        for number, batch in enumerate(make(self)):
            if number == 2 and os.environ["RANK"] == "1":
                asleep_in_the_loader()
            yield batch

    Loader.__iter__ = batches
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    """
)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hung_collective_leaves_every_ranks_stack_and_ends_the_job(tmp_path: Path) -> None:
    """One rank sleeps in its loader; the other waits for it in a collective, that is in native code."""
    script, out = tmp_path / "hangs.py", tmp_path / "run"
    script.write_text(HANGS)
    arguments = command(out, "train.max_steps=9", "train.hang_seconds=6", "checkpoint.every=0")
    run = start_process([sys.executable, *torchrun(2), str(script), *arguments])
    began = None
    while run.poll() is None:
        if began is None and len(metrics(out)) == 2:
            began = time.monotonic()
        time.sleep(0.05)
    assert began is not None, run.communicate()[0]
    took = time.monotonic() - began
    text, _ = run.communicate()
    assert run.returncode == 1, text
    assert took < 60, "not the half hour of the process group"
    waits, sleeps = ((out / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "all_reduce" in waits
    assert "in asleep_in_the_loader" in sleeps
    assert text.count("the step has stood still for") == 2
