"""A polite stop: the signal is noted and nothing else happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cantata.train.preempt import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    old = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, old, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted_and_can_come_twice(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop.received
    for _ in range(2):
        signal.raise_signal(number)
        assert stop.received


def test_one_that_a_launcher_held_back_is_not_lost() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.raise_signal(signal.SIGUSR1)
        stop = StopRequest()
        assert stop.received
        assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_control_c_still_interrupts() -> None:
    # Shells start what runs in the background deaf to it, the tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop = StopRequest()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not stop.received
    finally:
        signal.signal(signal.SIGINT, before)
