"""Errors keep their kind on the way from a worker."""

from __future__ import annotations

import signal

import pytest

from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.data.handover import DYING, Failure, arrived, died, leave_signals_to_the_trainer


@pytest.mark.parametrize(("is_config", "kind"), [(True, ConfigError), (False, RunError)])
def test_an_error_arrives_as_its_own_kind(is_config: bool, kind: type[CantataError]) -> None:
    with pytest.raises(kind, match="no such file"):
        arrived(Failure("no such file", is_config))


def test_a_dead_worker_is_one_line() -> None:
    error = died(RuntimeError("DataLoader worker (pid 7) exited\nunexpectedly"))
    assert str(error) == "a data worker ended (DataLoader worker (pid 7) exited); did it run out of memory?"
    assert "(ConnectionResetError)" in str(died(ConnectionResetError()))
    assert issubclass(ConnectionResetError, DYING)


def test_workers_ignore_what_is_meant_for_the_trainer() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        leave_signals_to_the_trainer(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
