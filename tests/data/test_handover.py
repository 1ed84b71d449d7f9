"""Errors keep their kind on the way from a worker."""

from __future__ import annotations

import signal

import pytest

from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.data.handover import DYING, Failure, arrived, deaths_told, died, leave_signals_to_the_trainer


@pytest.mark.parametrize(("is_config", "kind"), [(True, ConfigError), (False, RunError)])
def test_an_error_arrives_as_its_own_kind(is_config: bool, kind: type[CantataError]) -> None:
    with pytest.raises(kind, match="no such file"):
        arrived(Failure("no such file", is_config))


def test_a_dead_worker_is_one_line() -> None:
    error = died(RuntimeError("DataLoader worker (pid 7) exited\nunexpectedly"))
    assert str(error).startswith(
        "a data worker ended (DataLoader worker (pid 7) exited); if it ran out of memory"
    )
    assert "\n" not in str(error)
    assert "(ConnectionResetError)" in str(died(ConnectionResetError()))
    assert issubclass(ConnectionResetError, DYING)


def test_what_torch_raises_of_a_dead_worker_anywhere_is_the_same_line() -> None:
    told = r"a data worker ended \(DataLoader worker \(pid 7\) is killed by signal: Killed\);"
    with pytest.raises(RunError, match=told), deaths_told():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="shapes"), deaths_told():
        raise RuntimeError("shapes cannot be multiplied")


def test_workers_ignore_what_is_meant_for_the_trainer() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        leave_signals_to_the_trainer(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
