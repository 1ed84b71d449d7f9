"""What every kind of records offers, and reading one JSON object."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from cantata.core.samples import DataError

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jfif"})
VIDEOS = frozenset({"mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg"})
"""Endings of file names, without the dot, that mean an image or a clip."""


class Records(Protocol):
    """Mappings by index, as they lie in a file; nothing is decoded but text and JSON.

    The size is known when the object is built (`ConfigError` for what is absent or unreadable then); it
    pickles, and opens its file once in each process.
    """

    @property
    def root(self) -> Path | None:
        """Folder that relative paths in the records start from; None where there is none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `DataError` where this one record cannot be read."""
        ...


class Chain:
    """Records of several files, one after the other."""

    def __init__(self, parts: Sequence[Records], root: Path) -> None:
        self.root = root
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


def one_line(error: Exception) -> str:
    """The first line of a library's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises `DataError`: "not UTF-8" or "bad json", with `where` in its detail."""
    value = json_value(raw, where)
    if not isinstance(value, dict):
        raise DataError("bad json", f"{where}: {type(value).__name__} where an object is needed")
    return value


def json_value(raw: bytes, where: str) -> Any:
    """Any JSON value, else as `json_object`."""
    text = utf8(raw, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("bad json", f"{where}: {error}") from error


def utf8(raw: bytes, where: str) -> str:
    """Text. Raises `DataError("not UTF-8")` with `where` in its detail."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", f"{where}: {error}") from error
