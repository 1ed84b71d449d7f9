"""From a path to records."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.data.records.base import Chain, Records
from cantata.data.records.folder import Folder
from cantata.data.records.hub import load_saved
from cantata.data.records.json_file import JsonFile
from cantata.data.records.lines import JsonLines
from cantata.data.records.table import ParquetRows
from cantata.data.records.tar import TarShard


class RecordKind(Enum):
    """What a path holds; `auto` finds out by name and content."""

    auto = "auto"
    jsonl = "jsonl"
    json = "json"
    parquet = "parquet"
    tar = "tar"
    folder = "folder"
    datasets = "datasets"


OPEN: dict[RecordKind, Callable[[str], Records]] = {
    RecordKind.jsonl: JsonLines,
    RecordKind.json: JsonFile,
    RecordKind.parquet: ParquetRows,
    RecordKind.tar: TarShard,
    RecordKind.folder: Folder,
    RecordKind.datasets: load_saved,
}

ENDINGS = {
    ".jsonl": RecordKind.jsonl,
    ".ndjson": RecordKind.jsonl,
    ".parquet": RecordKind.parquet,
    ".tar": RecordKind.tar,
}


def open_records(path: str, kind: RecordKind) -> Records:
    """The records at `path`: a file, a folder, or a glob of files that are read one after the other.

    Raises `ConfigError` where nothing is there, or `auto` cannot tell what it is.
    """
    if glob.has_magic(path) and not Path(path).exists():
        files = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
        if not files:
            raise ConfigError(f"{path}: no file matches")
        parts = [open_records(file, kind) for file in files]
        return parts[0] if len(parts) == 1 else Chain(parts, Path(_fixed_part(path)).expanduser())
    return OPEN[_detect(path) if kind is RecordKind.auto else kind](path)


def _detect(path: str) -> RecordKind:
    found = asset(path)
    if found.is_dir():
        return _detect_folder(path, found)
    if found.suffix.lower() in ENDINGS:
        return ENDINGS[found.suffix.lower()]
    try:
        with found.open("rb") as file:
            head = file.read(1 << 20)
    except OSError as error:
        raise ConfigError(f"data file {path} cannot be read: {error}") from error
    if head.startswith(b"PAR1"):
        return RecordKind.parquet
    if head[257:262] == b"ustar":
        return RecordKind.tar
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        return RecordKind.jsonl if _is_lines(head) else RecordKind.json
    known = ", ".join(kind.value for kind in RecordKind if kind is not RecordKind.auto)
    raise ConfigError(f"data file {path}: neither its name nor its content says what it is; records: {known}")


def _detect_folder(path: str, folder: Path) -> RecordKind:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return RecordKind.datasets
    files = sorted(
        file.name for file in folder.iterdir() if file.suffix.lower() in (*ENDINGS, ".json", ".arrow")
    )
    if any(name in ("metadata.jsonl", "metadata.csv") for name in files) or len(Folder(path)):
        return RecordKind.folder
    some = f"; it holds {', '.join(files[:3])}" if files else ""
    raise ConfigError(f"{path}: a folder without media{some}; name a file, or several by a glob (DIR/*.tar)")


def _is_lines(head: bytes) -> bool:
    """Whether the first line is an object by itself, and another follows: JSON lines in a `.json` file."""
    first, _, rest = head.decode("utf-8-sig", errors="replace").lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def _fixed_part(pattern: str) -> str:
    """The folder that all matches share: everything before the first part with a wildcard."""
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:fixed])) if fixed else "."
