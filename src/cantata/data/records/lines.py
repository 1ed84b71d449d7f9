"""JSON lines: an object a line, found by its offset."""

from __future__ import annotations

from array import array
from typing import Any

from cantata.core.errors import ConfigError
from cantata.data.records.base import json_object
from cantata.data.sources import Spans


class JsonLines:
    """A jsonl file; blank lines are no records. One pass finds the lines; each is parsed when asked for.

    Args:
        path: the file, UTF-8.
    """

    def __init__(self, path: str) -> None:
        self._file = Spans(path)
        self.root = self._file.path.parent
        # 24 bytes a line: files of many millions of lines are usual.
        self._starts, self._lengths, self._numbers = array("q"), array("q"), array("q")
        offset = 0
        try:
            with self._file.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._starts.append(offset)
                        self._lengths.append(len(line))
                        self._numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise ConfigError(f"data file {path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._starts[index]
        raw = self._file.read(start, start + self._lengths[index])
        return json_object(raw, f"line {self._numbers[index]}")
