"""Errors keep their kind on the way from a worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import threading
import time

import pytest

from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.data.handover import (
    DYING,
    Failure,
    arrived,
    deaths_told,
    died,
    leave_signals_to_the_trainer,
    let_go,
    serve_the_trainer,
)


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


class Stopped:
    """As much of torch's iterator as `let_go` sees, with a worker that has written half a message."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._worker_result_queue = context.Queue()
        worker = context.Process(target=self.write_half, daemon=True)
        worker.start()
        self._workers = [worker]
        self._worker_pids_set = False

    def write_half(self) -> None:
        os.write(self._worker_result_queue._writer.fileno(), struct.pack("!i", 100) + b"half")
        time.sleep(600)


def test_a_wait_for_what_a_dead_worker_was_writing_ends_and_the_others_with_it() -> None:
    first, second = Stopped(), Stopped()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            first._worker_result_queue.get()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    let_go([first, second])
    assert second._workers[0].is_alive(), "while all live nothing is done"
    first._workers[0].kill()
    first._workers[0].join()
    thread.join(0.5)
    assert thread.is_alive()
    let_go([first, second])
    thread.join(60)
    assert isinstance(caught[0], DYING)
    second._workers[0].join(60)
    assert not second._workers[0].is_alive()


def test_a_worker_leaves_with_its_trainer() -> None:
    read, write = os.pipe()
    trainer = multiprocessing.get_context("fork").Process(target=train, args=(write,))
    trainer.start()
    os.close(write)
    assert os.read(read, 1) == b"+", "the worker has begun"
    trainer.kill()
    trainer.join()
    assert os.read(read, 1) == b"", "the last one that held the pipe is gone"
    os.close(read)


def train(write: int) -> None:
    worker = multiprocessing.get_context("fork").Process(target=work, args=(write,), daemon=True)
    worker.start()
    time.sleep(600)


def work(write: int) -> None:
    serve_the_trainer(0)
    os.write(write, b"+")
    threading.Event().wait()


def test_workers_ignore_what_is_meant_for_the_trainer() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        leave_signals_to_the_trainer()
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
