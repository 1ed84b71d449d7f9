"""Logs of a run: a file for each rank, and the console of rank 0."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from cantata.core.dist import is_main, rank

console = Console(stderr=True)
"""The one console: progress bars and log lines share it, so that neither tears the other."""

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SOURCES = ("cantata", "py.warnings")
"""The loggers that a run listens to."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; call it with `__name__`."""
    return logging.getLogger(name)


@contextmanager
def logging_to(run_dir: Path) -> Iterator[Path]:
    """Append to `run_dir/logs/rank-N.log`, which it yields, and show rank 0's lines on the console.

    A record logged with `extra={"shown": True}` goes to the file alone.
    Python warnings go the same way. An exception that leaves the block is written to the file
    with its traceback, so that a failed rank explains itself where its other lines are.
    """
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank()}.log"
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter(_FORMAT))
    handlers: list[logging.Handler] = [file]
    if is_main():
        on_console = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        on_console.addFilter(lambda record: not getattr(record, "shown", False))
        handlers.append(on_console)
    _attach(handlers)
    try:
        yield path
    except BaseException as error:
        trace = (type(error), error, error.__traceback__)
        file.handle(
            logging.LogRecord("cantata", logging.ERROR, __file__, 0, "stopped by %r", (error,), trace)
        )
        raise
    finally:
        _detach(handlers)


def _attach(handlers: list[logging.Handler]) -> None:
    logging.captureWarnings(True)
    for source in SOURCES:
        logger = logging.getLogger(source)
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)


def _detach(handlers: list[logging.Handler]) -> None:
    logging.captureWarnings(False)
    for handler in handlers:
        for source in SOURCES:
            logging.getLogger(source).removeHandler(handler)
        handler.close()
