"""Datasets: anything with a length that gives an example by index.

Each class finds out its size when it is built (a missing file or column is a `ConfigError` then) and opens
its file only when the first example is asked for, once in each process, so that worker processes never
share a handle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import DataError, Document, Example, Part
from cantata.data.media.images import open_image
from cantata.data.media.paths import resolve_inside
from cantata.data.split import Split, split_indices
from cantata.data.touched import touch


class Dataset(Protocol):
    """What a `dataset:` slot must build; it travels to worker processes, so it must pickle."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises `DataError` where this one example cannot be read."""
        ...


def is_sequential(data: object) -> bool:
    """Whether a dataset, or records, ask by a true `is_sequential` to be read in order, as a stream does.

    Most have no such attribute: they are shuffled.
    """
    return bool(getattr(data, "is_sequential", False))


def existing(path: str) -> Path:
    """The file behind a configured path (`embedded:` names one in the package); `ConfigError` if absent."""
    found = asset(path)
    if not found.is_file():
        raise ConfigError(f"{path}: a folder, where a data file is needed")
    return found


class PerProcess:
    """A file handle that is opened once in each process and never pickled."""

    def __init__(self) -> None:
        self._owner = -1
        self._value: Any = None

    def get(self, make: Any) -> Any:
        if self._owner != os.getpid():
            self._owner, self._value = os.getpid(), make()
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        return {"_owner": -1, "_value": None}


class Spans:
    """A file of which spans of bytes are read.

    Args:
        path: the file; `embedded:` names one in the package.

    Raises `ConfigError` where there is none.
    """

    def __init__(self, path: str) -> None:
        self.path = existing(path)
        self._file = PerProcess()

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, fewer where the file ends before."""
        file: IO[bytes] = self._file.get(lambda: self.path.open("rb"))
        file.seek(start)
        return file.read(end - start)


class CaptionedImages:
    """A parquet file of encoded images with a caption each: the image, then its caption.

    Args:
        path: the file; one row group is held in memory at a time, so a file that is read in random order
            wants small ones.
        image_column: column of encoded images (bytes, or the `{bytes, path}` structs of `datasets`).
        caption: the caption with columns in braces, such as `"{name} ({subgroup})"`.
        split: `train`, `held_out` or `all`.
        held_out_share: share of the rows that `held_out` gets, chosen by a hash of the row number.

    Raises `ConfigError` for a file that is absent or no parquet, and for an unknown column.
    """

    def __init__(
        self, path: str, image_column: str, caption: str, split: Split, held_out_share: float
    ) -> None:
        self.path = existing(path)
        self.image_column = image_column
        self.caption = caption
        try:
            with parquet.ParquetFile(self.path) as file:
                columns = set(file.schema_arrow.names)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        except (OSError, arrow.ArrowInvalid) as error:
            raise ConfigError(f"data file {path} is no readable parquet file: {error}") from error
        fields = [name for _, name, _, _ in Formatter().parse(caption) if name is not None]
        self._columns = [image_column, *dict.fromkeys(fields)]
        for name in self._columns:
            if name not in columns:
                raise ConfigError(
                    f"data file {path} has no column {name!r}; it has {', '.join(sorted(columns))}"
                )
        self._starts = np.cumsum([0, *groups])
        self._rows = split_indices(int(self._starts[-1]), split, held_out_share)
        self._file = PerProcess()
        self._loaded: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self._rows[index])
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        table = self._group(group)
        [record] = table.slice(row - int(self._starts[group]), 1).to_pylist()
        image = record[self.image_column]
        if isinstance(image, dict):
            image = image["bytes"]
        if image is None:
            raise DataError("missing image", f"row {row}")
        return Document((open_image(image), self.caption.format_map(record)))

    def _group(self, group: int) -> Any:
        file = self._file.get(lambda: parquet.ParquetFile(self.path))
        if self._loaded[0] != group:
            self._loaded = (group, file.read_row_group(group, columns=self._columns, use_threads=False))
        return self._loaded[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": (-1, None)}


class TextDocuments:
    """A UTF-8 text file, cut between paragraphs into documents of about `document_bytes`.

    A document ends where the next paragraph would make it longer. A paragraph that is longer by itself is
    cut between its lines, and a line that is longer stays whole.

    Args:
        path: the file.
        document_bytes: length to aim at, in bytes.
        split: `train`, `held_out` or `all`.
        held_out_share: share of the documents that `held_out` gets, chosen by a hash of their number.
    """

    def __init__(self, path: str, document_bytes: int, split: Split, held_out_share: float) -> None:
        self._file = Spans(path)
        if document_bytes < 1:
            raise ConfigError(f"document_bytes={document_bytes} must be at least 1")
        spans = document_spans(self._file.path.read_bytes(), document_bytes)
        self._spans: NDArray[np.int64] = spans[split_indices(len(spans), split, held_out_share)]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        start, end = (int(value) for value in self._spans[index])
        return Document((decoded(self._file.read(start, end)),))


class ImageTextFile:
    """Your own data: a jsonl file with a line for each example.

    A line is an object with `text` and, where it has any, `image` (a path, or a list of paths, relative to
    the jsonl file): the images come first, then the text. No path may lead out of the jsonl file's folder.

    Args:
        path: the jsonl file.
        split: `train`, `held_out` or `all`.
        held_out_share: share of the lines that `held_out` gets, chosen by a hash of their number.
    """

    def __init__(self, path: str, split: Split, held_out_share: float) -> None:
        self._file = Spans(path)
        self._root = self._file.path.parent.resolve()
        with self._file.path.open("rb") as file:
            lengths = [(len(line), bool(line.strip())) for line in file]
        ends = np.cumsum([length for length, _ in lengths], dtype=np.int64)
        spans = np.stack([ends - np.array([length for length, _ in lengths], dtype=np.int64), ends], axis=1)
        spans = spans[np.array([filled for _, filled in lengths], dtype=bool)]
        self._spans: NDArray[np.int64] = spans[split_indices(len(spans), split, held_out_share)]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        start, end = (int(value) for value in self._spans[index])
        line = decoded(self._file.read(start, end))
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError("invalid JSON", str(error)) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError("no text", "the line is no object with a `text` string")
        named = record.get("image") or []
        paths = [named] if isinstance(named, str) else named
        if not isinstance(paths, list) or not all(isinstance(name, str) for name in paths):
            raise DataError("no image path", "`image` is neither a path nor a list of paths")
        images: list[Part] = [self._image(name) for name in paths]
        return Document((*images, record["text"]))

    def _image(self, name: str) -> Image.Image:
        path = resolve_inside(self._root, name)
        # As it is named: a link may come to point elsewhere.
        touch(self._root / name)
        return open_image(path)


def document_spans(text: bytes, document_bytes: int) -> NDArray[np.int64]:
    """Start and end of each document, (documents, 2); the blank lines between documents belong to none."""
    spans: list[tuple[int, int]] = []
    start = end = 0
    for unit_start, unit_end in _units(text, document_bytes):
        if end > start and unit_end - start > document_bytes:
            spans.append((start, end))
            start = unit_start
        elif end == start:
            start = unit_start
        end = unit_end
    if end > start:
        spans.append((start, end))
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _units(text: bytes, longest: int) -> Iterator[tuple[int, int]]:
    """Start and end of each paragraph; of its lines instead where it is longer than `longest`."""
    for paragraph in re.finditer(rb"\S.*?(?=\n[ \t\r]*\n|\s*\Z)", text, re.DOTALL):
        start, end = paragraph.span()
        if end - start <= longest:
            yield start, end
        else:
            yield from (line.span() for line in re.compile(rb"[^\n]+").finditer(text, start, end))


def decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", str(error)) from error
