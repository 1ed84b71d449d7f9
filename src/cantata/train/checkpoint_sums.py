"""Checksums of a checkpoint's files: taken while they are written, compared before they are believed.

`checksums.json` names every other file of a checkpoint with its size and its CRC-32, which finds any single
run of wrong bits up to 32 long and all but one in four billion of other changes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

SUMS = "checksums.json"
PARTS = (".metadata", "state.json")
"""Without these a directory is no checkpoint."""
_CHUNK = 1 << 22


class FileSum(NamedTuple):
    """What was written to a file."""

    size: int
    """Bytes."""
    crc32: int

    @classmethod
    def of(cls, content: bytes) -> FileSum:
        return EMPTY.then(content, len(content))

    def then(self, content: Any, size: int) -> FileSum:
        """With `size` more bytes, those of `content`."""
        return FileSum(self.size + size, zlib.crc32(content, self.crc32))


EMPTY = FileSum(0, 0)


class SummingWriter(FileSystemWriter):
    """DCP's writer, which knows the sums of this rank's files by name once it has written them.

    A failed write names the file and how far it came.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sums: dict[str, FileSum] = {}
        self.fs = _SummingFiles(self.sums)


class _SummingFiles(FileSystem):
    def __init__(self, sums: dict[str, FileSum]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        name, file = Path(path).name, _SummedFile()
        try:
            with super().create_stream(path, mode) as file.stream:
                yield file
        except (OSError, RuntimeError) as error:
            # What torch makes of a failed write says nothing of the disk.
            cause = file.failure or error
            if not isinstance(cause, OSError):
                raise
            where = f"{name}: {cause.strerror} after {file.sum.size:,} bytes"
            raise OSError(cause.errno, where) from error
        self._sums[name] = file.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)


class _SummedFile:
    """As much of a file as DCP writes through."""

    stream: Any

    def __init__(self) -> None:
        self.sum = EMPTY
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            written: int = self.stream.write(content)
        except OSError as error:
            self.failure = error
            raise
        self.sum = self.sum.then(content, written)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def as_json(sums: Mapping[str, FileSum]) -> str:
    """What `checksums.json` holds."""
    return json.dumps(
        {name: {"bytes": s.size, "crc32": f"{s.crc32:08x}"} for name, s in sorted(sums.items())}
    )


def is_summed(checkpoint: Path) -> bool:
    """Whether damage in a checkpoint can be seen; versions before checksums wrote none."""
    return (checkpoint / SUMS).is_file()


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with part `part` of `parts` of a checkpoint's files; empty where nothing is.

    Reads the files whole, several at once. A checkpoint without sums must only have what `PARTS` names.
    """
    for name in PARTS:
        if not (checkpoint / name).is_file():
            return f"{name} is not there"
    if not is_summed(checkpoint):
        return ""
    try:
        entries = json.loads((checkpoint / SUMS).read_bytes())
        wanted = {name: FileSum(entry["bytes"], int(entry["crc32"], 16)) for name, entry in entries.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{SUMS} cannot be read ({error})"
    mine = sorted(wanted)[part::parts]
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: _difference(checkpoint / name, wanted[name]), mine)
        return next(filter(None, found), "")


def damage_seen_by_any(checkpoint: Path, group: dist.ProcessGroup) -> str:
    """`damage` in any file, of which every rank of `group` reads its share; the same on all of them."""
    found = [""] * dist.get_world_size(group)
    dist.all_gather_object(found, damage(checkpoint, dist.get_rank(group), len(found)), group=group)
    return next(filter(None, found), "")


def _difference(path: Path, wanted: FileSum) -> str:
    found = EMPTY
    try:
        with path.open("rb") as file:
            while content := file.read(_CHUNK):
                found = found.then(content, len(content))
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if found.size != wanted.size:
        return f"{path.name} holds {found.size:,} bytes, {wanted.size:,} were written"
    return "" if found == wanted else f"{path.name} does not match its checksum"
