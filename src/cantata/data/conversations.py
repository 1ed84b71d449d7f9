"""The general dataset: records of any kind, in any known format, with their media."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import DataError, Example
from cantata.data.formats import Format, choose_format
from cantata.data.formats.base import FormatFunction, keys_of, merged
from cantata.data.formats.template import Template
from cantata.data.media import Media, PdfOptions, VideoOptions
from cantata.data.records import RecordKind, Records, open_records
from cantata.data.sources import is_sequential
from cantata.data.split import Split, split_indices

LOOK = 16
"""Records that are read to find out the format."""

TRAIN, TEST = "train.jsonl", "test.jsonl"
"""The files of a dataset folder as Aria's authors lay it out."""


class Conversations:
    """Conversations, captions or texts from a file, a folder, a glob of files or other records.

    Args:
        path: what `cantata.data.records.open_records` takes; a folder with `train.jsonl` and perhaps
            `test.jsonl`, the first of which is trained on and the second held out; or a `_target_` that
            builds records (such as `cantata.data.records.spool.Spool`).
        records: what the path holds, where `auto` cannot tell.
        format: how a record is written, where `auto` cannot tell by its keys.
        template: turns by role written from columns, in place of a format
            (`{user: "<image>Is it true? {sentence}", assistant: "{label}"}`); null where there is a format.
        root: folder that paths in the records start from, and that none leads out of; null: the file's.
        split: `train`, `held_out` or `all`.
        held_out_share: share of the records that `held_out` gets, chosen by a hash of their number; where
            there is a `test.jsonl` it must be 0.
        video: how clips become frames.
        pdf: how documents become pages.

    Raises `ConfigError` where nothing is there or the format cannot be told. A record that cannot be read
    raises `DataError` when it is asked for.
    """

    def __init__(
        self,
        path: str | Records,
        records: RecordKind,
        format: Format,
        template: dict[str, str] | None,
        root: str | None,
        split: Split,
        held_out_share: float,
        video: VideoOptions,
        pdf: PdfOptions,
    ) -> None:
        if isinstance(path, str):
            path, split = _file_of_split(path, records, split, held_out_share)
            self._records: Records = open_records(path, records)
            name = path
        else:
            self._records, name = path, type(path).__name__
        found = asset(root) if root is not None else self._records.root
        # Where no root is known, no path can be: a place in which nothing lies.
        self.media = Media(found if found is not None else Path(os.devnull), video, pdf)
        self._rows = split_indices(len(self._records), split, held_out_share)
        try:
            self._format = self._find_format(format, template)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    @property
    def is_sequential(self) -> bool:
        """Whether the records are a stream, to be read in order."""
        return is_sequential(self._records)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        record = merged(self._records[int(self._rows[index])])
        return self._format(record, self.media)

    def _find_format(self, format: Format, template: Mapping[str, str] | None) -> FormatFunction:
        first = self._first_records()
        if template is None:
            return choose_format(first, format)
        if format is not Format.auto:
            raise ConfigError(f"format={format.value} and a template; set one of them")
        chosen = Template(template)
        if not any(chosen.columns <= record.keys() for record in first):
            missing = ", ".join(sorted(chosen.columns - first[0].keys()))
            raise ConfigError(f"the template asks for {missing}; the records hold {keys_of(first[0])}")
        return chosen

    def _first_records(self) -> list[dict[str, Any]]:
        """Those of the first records that can be read. Raises `ConfigError` where none can."""
        found, errors = [], []
        for index in islice(range(len(self._records)), LOOK):
            try:
                found.append(merged(self._records[index]))
            except DataError as error:
                errors.append(error)
        if not found:
            why = f"none of the first {len(errors)} can be read, {errors[0]}" if errors else "it is empty"
            raise ConfigError(f"no record: {why}")
        return found


def _file_of_split(path: str, records: RecordKind, split: Split, held_out_share: float) -> tuple[str, Split]:
    """The file of the split in a folder of Aria's layout; else the path as it is."""
    train, test = Path(path).expanduser() / TRAIN, Path(path).expanduser() / TEST
    if records is not RecordKind.auto or not train.is_file():
        return path, split
    if not test.is_file():
        return str(train), split
    if split is Split.all:
        raise ConfigError(f"{path}: split=all of {TRAIN} and {TEST}; name one of the files")
    if held_out_share:
        raise ConfigError(f"{path}: {TEST} is held out; set held_out_share=0")
    return str(train if split is Split.train else test), Split.all
