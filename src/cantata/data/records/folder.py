"""A folder of images, clips or PDFs, with what is said of each beside it or in a metadata file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import DataError
from cantata.data.records.base import IMAGES, VIDEOS, Records, json_object, utf8
from cantata.data.records.lines import JsonLines

FILE_NAME = "file_name"
"""Column of a metadata file that names the file, as `datasets` has it for image folders; `X_file_name` and
`X_file_names` name those of column X."""

COLUMNS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(VIDEOS, "video"), "pdf": "pdf"}


class Folder:
    """The media files of a folder and of the folders in it, sorted by path.

    With a `metadata.jsonl` or `metadata.csv` in it, its lines are the records, and `file_name` (relative to
    the folder) becomes `image`, `video` or `pdf`. Else each file is a record with the `text` of its `.txt`
    and the keys of its `.json` of the same name, where there are such.

    Args:
        path: the folder.
    """

    def __init__(self, path: str) -> None:
        self.root = asset(path)
        if not self.root.is_dir():
            raise ConfigError(f"{path}: a file, where a folder is needed")
        self._rows: Records | list[dict[str, Any]] | None = None
        self._files: list[str] = []
        try:
            if (self.root / "metadata.jsonl").is_file():
                self._rows = JsonLines(str(self.root / "metadata.jsonl"))
            elif (self.root / "metadata.csv").is_file():
                self._rows = _csv_rows(self.root / "metadata.csv")
            else:
                found = (file for file in self.root.rglob("*") if _ending(file.name) in COLUMNS)
                names = (file.relative_to(self.root) for file in found if file.is_file())
                self._files = sorted(str(name) for name in names if not name.name.startswith("."))
        except OSError as error:
            raise ConfigError(f"folder {path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._files if self._rows is None else self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._rows is not None:
            return _with_media(self._rows[index])
        name = self._files[index]
        record: dict[str, Any] = {}
        said = (self.root / name).with_suffix(".json")
        if said.is_file():
            record = json_object(_read(said), said.name)
        text = (self.root / name).with_suffix(".txt")
        if text.is_file():
            record["text"] = utf8(_read(text), text.name)
        record[COLUMNS[_ending(name)]] = name
        return record


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError("unreadable file", str(error)) from error


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True, restkey="", restval="")
            return [{key: value for key, value in row.items() if key} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"data file {file} is no readable CSV: {error}") from error


def _with_media(row: dict[str, Any]) -> dict[str, Any]:
    """File names under the names of their media; paths stay relative to the folder."""
    record = {}
    for key, value in row.items():
        if key == FILE_NAME:
            column = COLUMNS.get(_ending(str(value)))
            if column is None:
                raise DataError("no media file", f"{FILE_NAME} is {value!r}")
            record[column] = value
        elif key.endswith((f"_{FILE_NAME}", f"_{FILE_NAME}s")):
            record[key.rpartition("_file_name")[0]] = value
        else:
            record[key] = value
    return record
