"""The next thing is made while the last one is in use."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def repeated(make: Callable[[], T]) -> Generator[T, None, None]:
    """What `make` gives, call after call, each when it is asked for."""
    while True:
        yield make()


def nothing() -> None:
    """What is done where nothing is."""


def one_ahead(make: Callable[[], T], release: Callable[[], None] = nothing) -> Generator[T, None, None]:
    """What `make` gives, call after call, without end; an error comes when its turn does.

    The first is made at once in this thread, to which the processes that it starts then belong. Closing waits
    for the one that is being made, after it has called `release`, which may cut that short.
    """
    value = make()
    with ThreadPoolExecutor(1, "ahead") as thread:
        try:
            while True:
                following = thread.submit(make)
                yield value
                value = following.result()
        finally:
            release()
