"""Which files a sample is made of: what opens media says so, and whoever asks listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

Stat = tuple[str, int, int]
"""Path, bytes and time of change in nanoseconds of a file; -1 and -1 where it is absent."""

_listening: ContextVar[dict[Path, Stat] | None] = ContextVar("listening", default=None)


def touch(path: Path) -> None:
    """Say, before it is opened, that the sample being read depends on this file, there or not."""
    files = _listening.get()
    if files is not None:
        files.setdefault(path, stat_of(path))


@contextmanager
def touching() -> Iterator[dict[Path, Stat]]:
    """Collects the files that are touched inside, as they were then."""
    files: dict[Path, Stat] = {}
    token = _listening.set(files)
    try:
        yield files
    finally:
        _listening.reset(token)


def stat_of(path: Path) -> Stat:
    """What tells the file from another or a changed one, without reading it."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return str(path.absolute()), -1, -1
    return str(path.absolute()), found.st_size, found.st_mtime_ns
