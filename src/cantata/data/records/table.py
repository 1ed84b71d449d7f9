"""Parquet: a row is a record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records.base import one_line
from cantata.data.sources import PerProcess, existing


class ParquetRows:
    """The rows of a parquet file, all columns; images stay bytes or `{bytes, path}` structs.

    A process holds one row group in memory at a time. Samples are read in random order, so a file of many
    large groups is decoded again and again: write such files with small groups (about a hundred rows).

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = existing(path)
        self.root = self.path.parent
        try:
            with parquet.ParquetFile(self.path) as file:
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        except (OSError, arrow.ArrowException) as error:
            raise ConfigError(f"data file {path} is no readable parquet file: {one_line(error)}") from error
        self._starts = np.cumsum([0, *groups])
        self._file = PerProcess()
        self._loaded: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            row = self._group(group).slice(index - int(self._starts[group]), 1)
            [record] = row.to_pylist()
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise DataError("unreadable row", f"row {index}: {one_line(error)}") from error
        return dict(record)

    def _group(self, group: int) -> Any:
        file = self._file.get(lambda: parquet.ParquetFile(self.path))
        if self._loaded[0] != group:
            self._loaded = (group, file.read_row_group(group, use_threads=False))
        return self._loaded[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": (-1, None)}
