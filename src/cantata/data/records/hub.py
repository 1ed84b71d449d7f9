"""Rows of the Hugging Face `datasets` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import DataError
from cantata.data.records.base import one_line

MISSING = "reading Hugging Face datasets needs `datasets`: pip install 'cantata[datasets]'"


class DatasetRows:
    """A `datasets.Dataset`, in memory or memory-mapped; images stay `{bytes, path}` structs.

    Args:
        dataset: a `datasets.Dataset`.
        root: folder that relative paths in the rows start from; None where they name no files.
    """

    def __init__(self, dataset: Any, root: Path | None) -> None:
        self.root = root
        # Rows as arrow hold what was stored: nothing is decoded before the record is looked at.
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            [record] = self._dataset[index].to_pylist()
        except (OSError, ValueError) as error:
            raise DataError("unreadable row", f"row {index}: {one_line(error)}") from error
        return dict(record)


def load_saved(path: str) -> DatasetRows:
    """A folder that `Dataset.save_to_disk` made; of a `DatasetDict`, the folder of one split.

    Raises `ConfigError` where it is none.
    """
    folder = asset(path)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if (entry / "state.json").is_file())
        raise ConfigError(f"{path} holds the splits {', '.join(splits)}; name one, as {path}/{splits[0]}")
    library = datasets_library()
    try:
        return DatasetRows(library.load_from_disk(str(folder)), folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no readable saved dataset: {one_line(error)}") from error


def load_hub(name: str, config: str | None, data_files: Sequence[str] | None, split: str) -> DatasetRows:
    """What `datasets.load_dataset` loads, with random access: downloaded, or built from local files.

    Args:
        name: a dataset on the hub, a local folder, or a builder (`json`, `csv`, `arrow`, ...).
        config: name of its configuration; null where it has one only.
        data_files: files of the builder.
        split: its split, such as `train` or `train[:1000]`.
    """
    return DatasetRows(call_load_dataset(name, config, data_files, split, streaming=False), root=None)


def call_load_dataset(
    name: str, config: str | None, data_files: Sequence[str] | None, split: str, *, streaming: bool
) -> Any:
    """`datasets.load_dataset`, its many ways to fail as one `ConfigError`."""
    library = datasets_library()
    files = list(data_files) if data_files is not None else None
    try:
        return library.load_dataset(name, config, data_files=files, split=split, streaming=streaming)
    except Exception as error:
        raise ConfigError(f"datasets cannot load {name} ({split}): {one_line(error)}") from error


def datasets_library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(MISSING) from error
    return datasets
