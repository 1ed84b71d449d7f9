"""One ahead: in order, beside the one in use, errors in their turn, and nothing under way after closing."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from cantata.data.ahead import one_ahead


def test_the_next_one_is_made_while_this_one_is_in_use() -> None:
    numbers, made = count(), threading.Semaphore(0)

    def make() -> tuple[int, threading.Thread]:
        made.release()
        return next(numbers), threading.current_thread()

    values = one_ahead(make)
    first, thread = next(values)
    assert (first, thread) == (0, threading.current_thread())
    assert made.acquire(timeout=5)
    assert made.acquire(timeout=5), "the second was made though nobody asked"
    second, thread = next(values)
    assert second == 1
    assert thread is not threading.current_thread()
    assert [number for number, _ in (next(values), next(values))] == [2, 3]
    values.close()


def test_an_error_comes_in_its_turn() -> None:
    numbers = count()

    def make() -> int:
        number = next(numbers)
        if number == 2:
            raise KeyError("the third")
        return number

    values = one_ahead(make)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(KeyError, match="the third"):
        next(values)


def test_closing_waits_for_the_one_under_way() -> None:
    done: list[int] = []

    def make() -> int:
        time.sleep(0.05 * len(done))
        done.append(1)
        return len(done)

    values = one_ahead(make)
    assert next(values) == 1
    values.close()
    assert len(done) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
