"""Streamed datasets with random access: rows are kept on local disk as they come by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import DataError
from cantata.data.records.base import one_line
from cantata.data.records.hub import call_load_dataset
from cantata.data.sources import PerProcess

CHUNK = 256
"""Rows of a file of the spool."""

STATE = "stream.json"


class Spool:
    """The first `rows` rows of a streamed dataset, in the stream's order.

    Row i is there once the stream has come that far: whoever asks for it first streams up to it, the other
    processes of the machine wait. Every row crosses the network once for each machine, and stays on its disk
    (in as many bytes as the rows have) for later epochs and runs. The loader asks in the stream's order, in
    every epoch, so a run begins with the first rows; nothing shuffles them but the mix with other sources.
    More `rows` in a later run go on where this spool ends.

    Args:
        name: a dataset on the hub, a local folder, or a builder (`json`, `csv`, `arrow`, ...).
        config: name of its configuration; null where it has one only.
        data_files: files of the builder.
        split: its split.
        rows: how many to take; a stream that ends before leaves `DataError("stream ended")` for the rest.
        folder: where the spool is kept, on a disk of this machine.
    """

    is_sequential = True

    def __init__(
        self,
        name: str,
        config: str | None,
        data_files: Sequence[str] | None,
        split: str,
        rows: int,
        folder: str,
    ) -> None:
        if rows < 1:
            raise ConfigError(f"rows={rows} of a streamed dataset must be at least 1")
        self._source = (name, config, list(data_files) if data_files is not None else None, split)
        digest = hashlib.blake2b(json.dumps(self._source).encode(), digest_size=8).hexdigest()
        self._folder = Path(folder).expanduser() / digest
        self._rows = rows
        self._stream = PerProcess()
        self._loaded: tuple[int, Any] = (-1, None)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the spool cannot be kept in {folder}: {error}") from error
        state = self._state()
        if not state["ended"] and state["chunks"] * CHUNK < rows:
            # Only to say now that it cannot be streamed; a full spool needs no network.
            self._open_stream()

    @property
    def root(self) -> None:
        return None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        chunk, place = divmod(index, CHUNK)
        if self._loaded[0] != chunk:
            self._loaded = (chunk, self._table(chunk))
        table = self._loaded[1]
        if table is None or place >= table.num_rows:
            # A chunk that is not full is the stream's last, so it never grows.
            raise DataError("stream ended", f"row {index} of {self._rows} asked for")
        try:
            [record] = table.slice(place, 1).to_pylist()
        except (ValueError, arrow.ArrowException) as error:
            raise DataError("unreadable row", f"row {index}: {one_line(error)}") from error
        return dict(record)

    def _table(self, chunk: int) -> Any:
        file = self._folder / f"rows-{chunk:08d}.arrow"
        if not file.exists():
            from filelock import FileLock

            with FileLock(str(self._folder / "lock")):
                while not file.exists() and self._pull():
                    pass
        if not file.exists():
            return None
        with arrow.memory_map(str(file)) as source:
            return arrow.ipc.open_file(source).read_all()

    def _pull(self) -> bool:
        """Write the next chunk; False where the stream has ended. The lock is held."""
        state = self._state()
        if state["ended"]:
            return False
        stream = self._stream.get(Stream)
        try:
            if stream.chunks != state["chunks"]:
                # Another process went on meanwhile, or an earlier run did.
                stream.start(self._open_stream(), state)
            table, position = stream.next_chunk()
        except Exception as error:
            raise RunError(f"the stream of {self._source[0]} failed: {one_line(error)}") from error
        if table is not None:
            file = self._folder / f"rows-{state['chunks']:08d}.arrow"
            partial = file.with_suffix(".incomplete")
            with arrow.OSFile(str(partial), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(partial, file)
        ended = table is None or table.num_rows < CHUNK
        state = {"chunks": stream.chunks, "ended": ended, "stream": position}
        partial = self._folder / f"{STATE}.incomplete"
        partial.write_text(json.dumps(state))
        os.replace(partial, self._folder / STATE)
        return table is not None

    def _state(self) -> dict[str, Any]:
        file = self._folder / STATE
        if not file.exists():
            return {"chunks": 0, "ended": False, "stream": None}
        state: dict[str, Any] = json.loads(file.read_text())
        return state

    def _open_stream(self) -> Any:
        return call_load_dataset(*self._source, streaming=True).with_format("arrow")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": (-1, None)}


class Stream:
    """An iterable dataset on its way; lives in one process."""

    def __init__(self) -> None:
        self.chunks = -1
        """Chunks that were taken; -1 before it has begun."""
        self._dataset: Any = None
        self._tables: Iterator[Any] = iter(())

    def start(self, dataset: Any, state: dict[str, Any]) -> None:
        """Go on after `state["chunks"]` chunks."""
        self.chunks = -1
        if state["stream"] is not None:
            dataset.load_state_dict(state["stream"])
        self._dataset = dataset
        self._tables = iter(dataset.iter(batch_size=CHUNK))
        self.chunks = state["chunks"]

    def next_chunk(self) -> tuple[Any, Any]:
        """The next rows, fewer than a chunk at the end of the stream, and the stream's state after them."""
        count, self.chunks = self.chunks, -1
        table = next(self._tables, None)
        self.chunks = count + (table is not None)
        return table, self._dataset.state_dict()
