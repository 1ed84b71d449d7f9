"""From worker processes to the trainer: rows, errors, and whose signals are whose."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data._utils import signal_handling

from cantata.core.errors import ConfigError, RunError


class Failure(NamedTuple):
    """An error on its way from a worker process to the trainer."""

    message: str
    is_config: bool


def serve_the_trainer(worker: int) -> None:
    """What a worker does first: it leaves signals to the trainer, and leaves with it, however that ends."""
    leave_signals_to_the_trainer()
    threading.Thread(target=_leave_with_the_trainer, name="leave", daemon=True).start()


def leave_signals_to_the_trainer() -> None:
    # A signal to the whole job asks the trainer to save and stop; it still needs its workers for that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _leave_with_the_trainer() -> None:
    # Torch's own watch ends in a wait for rows to be taken that nobody will take.
    trainer = multiprocessing.parent_process()
    while trainer is not None and os.getppid() == trainer.pid:
        time.sleep(1.0)
    os._exit(1)


def let_go(iterators: Sequence[Any]) -> None:
    """Where a worker has died, end the others, and with them every wait for what they were writing.

    One that is killed while it writes leaves half a row in its pipe and the trainer's thread waiting for the
    rest; the pipe ends only when no process can write to it any more. Does nothing while all live.
    """
    workers = [worker for one in iterators for worker in one._workers]
    if all(worker.is_alive() for worker in workers):
        return
    for one in iterators:
        # Or torch's handler would take their end for another death, and raise wherever the trainer stands.
        if one._worker_pids_set:
            signal_handling._remove_worker_pids(id(one))  # type: ignore[attr-defined]
            one._worker_pids_set = False
    for worker in workers:
        worker.kill()
    for one in iterators:
        one._worker_result_queue._writer.close()


def unchanged(item: Any) -> Any:
    return item


DYING = (RuntimeError, OSError, EOFError)
"""What reading from a worker that was killed raises; which one depends on where it died."""


def died(error: Exception) -> RunError:
    """The one line for an error of `DYING`.

    Raise it where the iterator is no local: a traceback that is kept would keep the workers too.
    """
    cause = (str(error) or type(error).__name__).splitlines()[0].strip(" .")
    return RunError(
        f"a data worker ended ({cause}); if it ran out of memory, fewer data.num_workers or a smaller "
        "data.prefetch need less; the same command goes on from the last checkpoint"
    )


@contextmanager
def deaths_told() -> Iterator[None]:
    """Turn what torch raises when a worker dies, wherever the trainer happens to be, into `died`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise died(error) from error


def arrived(item: Any) -> Any:
    """The row, or the worker's error as its own."""
    if isinstance(item, Failure):
        raise (ConfigError if item.is_config else RunError)(item.message)
    return item
