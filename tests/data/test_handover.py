"""Errors keep their kind on the way from a worker."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.data.handover import Failure, arrived, leave_signals_to_the_trainer, received


@pytest.mark.parametrize(("is_config", "kind"), [(True, ConfigError), (False, RunError)])
def test_an_error_arrives_as_its_own_kind(is_config: bool, kind: type[CantataError]) -> None:
    with pytest.raises(kind, match="no such file"):
        arrived(Failure("no such file", is_config))


def test_a_dead_worker_is_one_line_and_an_error_of_ones_own_is_not() -> None:
    def dying() -> Iterator[object]:
        yield 1
        raise RuntimeError("DataLoader worker (pid 7) exited\nunexpectedly")

    items = dying()
    assert received(items, has_workers=True) == 1
    with pytest.raises(RunError, match=r"a data worker ended \(DataLoader worker \(pid 7\) exited\); did it"):
        received(items, has_workers=True)
    with pytest.raises(StopIteration):
        received(items, has_workers=True)
    items = dying()
    next(items)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        received(items, has_workers=False)


def test_workers_ignore_what_is_meant_for_the_trainer() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        leave_signals_to_the_trainer(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
