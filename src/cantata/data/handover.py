"""From worker processes to the trainer: rows, errors, and whose signals are whose."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

from cantata.core.errors import ConfigError, RunError


class Failure(NamedTuple):
    """An error on its way from a worker process to the trainer."""

    message: str
    is_config: bool


def leave_signals_to_the_trainer(worker: int) -> None:
    # A signal to the whole job asks the trainer to save and stop; it still needs its workers for that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def unchanged(item: Any) -> Any:
    return item


DYING = (RuntimeError, OSError, EOFError)
"""What reading from a worker that was killed raises; which one depends on where it died."""


def died(error: Exception) -> RunError:
    """The one line for an error of `DYING`.

    Raise it where the iterator is no local: a traceback that is kept would keep the workers too.
    """
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return RunError(f"a data worker ended ({cause}); did it run out of memory?")


def arrived(item: Any) -> Any:
    """The row, or the worker's error as its own."""
    if isinstance(item, Failure):
        raise (ConfigError if item.is_config else RunError)(item.message)
    return item
