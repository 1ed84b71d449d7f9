"""A JSON file with an array of objects, found by their offsets."""

from __future__ import annotations

import json
import re
from array import array
from typing import Any

from cantata.core.errors import ConfigError
from cantata.data.records.base import json_object
from cantata.data.sources import Spans

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonFile:
    """A JSON file: an array, or an object that holds exactly one array. Its elements are the records.

    The whole file is parsed once, when the object is built, and only the elements' offsets are kept.

    Args:
        path: the file, UTF-8.

    Raises `ConfigError` where the file is no such JSON.
    """

    def __init__(self, path: str) -> None:
        self._file = Spans(path)
        self.root = self._file.path.parent
        try:
            text = self._file.path.read_bytes().decode("utf-8")
            spans = element_spans(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"data file {path} holds no readable JSON array: {error}") from error
        self._starts, self._ends = array("q"), array("q")
        offset = place = 0
        for start, end in spans:
            offset += len(text[place:start].encode())
            self._starts.append(offset)
            offset += len(text[start:end].encode())
            self._ends.append(offset)
            place = end

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return json_object(self._file.read(self._starts[index], self._ends[index]), f"element {index}")


def element_spans(text: str) -> list[tuple[int, int]]:
    """Start and end, in characters, of each element of the file's array. Raises `ValueError`."""
    start = _skip(text, 1 if text.startswith("\ufeff") else 0)
    arrays: list[list[tuple[int, int]]] = []
    if text[start : start + 1] == "[":
        spans, end = _elements(text, start)
        arrays.append(spans)
    elif text[start : start + 1] == "{":
        arrays, end = _arrays_of_members(text, start)
    else:
        raise ValueError("it begins with neither [ nor {")
    end = _skip(text, end)
    if end != len(text):
        raise json.JSONDecodeError("something follows the end", text, end)
    if len(arrays) != 1:
        raise ValueError(f"its object holds {len(arrays)} arrays, where one is needed")
    return arrays[0]


def _elements(text: str, start: int) -> tuple[list[tuple[int, int]], int]:
    spans = []
    place = _skip(text, start + 1)
    while text[place : place + 1] != "]":
        _, end = _DECODER.raw_decode(text, place)
        spans.append((place, end))
        place = _next(text, end, "]")
    return spans, place + 1


def _arrays_of_members(text: str, start: int) -> tuple[list[list[tuple[int, int]]], int]:
    arrays = []
    place = _skip(text, start + 1)
    while text[place : place + 1] != "}":
        name, end = _DECODER.raw_decode(text, place)
        end = _skip(text, end)
        if not isinstance(name, str) or text[end : end + 1] != ":":
            raise json.JSONDecodeError("no member of an object", text, place)
        value = _skip(text, end + 1)
        if text[value : value + 1] == "[":
            spans, end = _elements(text, value)
            arrays.append(spans)
        else:
            _, end = _DECODER.raw_decode(text, value)
        place = _next(text, end, "}")
    return arrays, place + 1


def _next(text: str, end: int, closing: str) -> int:
    """The place after a comma, or of the closing bracket."""
    place = _skip(text, end)
    if text[place : place + 1] == ",":
        place = _skip(text, place + 1)
        if text[place : place + 1] == closing:
            raise json.JSONDecodeError("nothing after a comma", text, place)
        return place
    if text[place : place + 1] != closing:
        raise json.JSONDecodeError(f"neither a comma nor {closing}", text, place)
    return place


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place
