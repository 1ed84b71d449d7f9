"""Webdataset shards: the members of a tar that share a stem are one record."""

from __future__ import annotations

import tarfile
from pathlib import PurePosixPath
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records.base import json_value, one_line, utf8
from cantata.data.sources import Spans

TEXTS = frozenset({"txt", "text", "cls"})

Members = dict[str, tuple[int, int]]
"""Offset and size in bytes of each member of a record, by its ending."""


class TarShard:
    """An uncompressed webdataset shard; a record has `__key__` and its members by their ending.

    A stem ends at the first dot of a file's name. `.txt`, `.text` and `.cls` become text, `.json` what it
    says, everything else stays bytes. One pass over the headers finds the members; nothing is unpacked.

    Args:
        path: the file.

    Raises `ConfigError` where it is compressed, truncated or no tar, or holds a member twice.
    """

    def __init__(self, path: str) -> None:
        self._file = Spans(path)
        self.root = self._file.path.parent
        found: dict[str, Members] = {}
        try:
            with tarfile.open(self._file.path, "r:") as tar:
                for member in tar:
                    key, ending = _split(member.name)
                    if not member.isfile() or not key:
                        continue
                    members = found.setdefault(key, {})
                    if ending in members:
                        raise ConfigError(f"data file {path} holds {member.name} twice")
                    members[ending] = (member.offset_data, member.size)
                end = tar.offset
            with self._file.path.open("rb") as file:
                # tarfile stops without a word at a damaged header; a whole tar ends in zeros.
                file.seek(end)
                rest = file.read(tarfile.BLOCKSIZE)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ConfigError(
                f"data file {path} is no readable uncompressed tar: {one_line(error)}; a compressed one "
                "cannot be read in random order, decompress it"
            ) from error
        if rest.strip(b"\0"):
            raise ConfigError(f"data file {path} is damaged at byte {end}, after {len(found)} records")
        self._records = list(found.items())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, members = self._records[index]
        record: dict[str, Any] = {"__key__": key}
        for ending, (start, size) in members.items():
            raw = self._file.read(start, start + size)
            if len(raw) != size:
                raise DataError("truncated file", f"{key}.{ending} of {self._file.path.name}")
            record[ending] = _decoded(raw, ending, f"{key}.{ending}")
        return record


def _split(name: str) -> tuple[str, str]:
    """Stem and ending of a member; no stem for hidden files and files without an ending."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return (str(path.parent / stem), ending.lower()) if stem and ending else ("", "")


def _decoded(raw: bytes, ending: str, where: str) -> Any:
    last = ending.rpartition(".")[2]
    if last in TEXTS:
        return utf8(raw, where)
    if last == "json":
        return json_value(raw, where)
    return raw
