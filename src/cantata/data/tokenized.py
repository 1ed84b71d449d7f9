"""Datasets of images that a tokenizer has turned into codes, so that training needs no pixels and no decoder.

<folder>/codes.json             what made the codes: the tokenizer's digest, its codes, the sizes, the data
<folder>/<source>/00000.parquet examples in the source's order, each with its texts, its codes and its index
"""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import Chat, Codes, DataError, Document, Example, Message, Part
from cantata.core.suggest import hint
from cantata.data.sources import PerProcess
from cantata.data.split import Split, split_indices

MANIFEST = "codes.json"
SCHEMA = arrow.schema(
    [
        ("index", arrow.int64()),
        ("example", arrow.string()),
        ("codes", arrow.list_(arrow.list_(arrow.int32()))),
        ("shapes", arrow.list_(arrow.list_(arrow.int32()))),
    ]
)
Order = Enum("Order", {"as_is": "as_is", "text_first": "text_first", "image_first": "image_first"})
"""In which order the parts of a document stand: as they came, texts before images, or behind them."""


def to_record(index: int, example: Example, codes: list[np.ndarray]) -> dict[str, Any]:
    """An example with its images replaced by `codes`, as a row of `SCHEMA`."""
    count = 0

    def spelt(part: Part) -> Any:
        nonlocal count
        if isinstance(part, str):
            return part
        count += 1
        return count - 1

    if isinstance(example, Document):
        content: Any = [spelt(part) for part in example.parts]
    else:
        content = [
            {"role": message.role, "weight": message.weight, "parts": [spelt(part) for part in message.parts]}
            for message in example.messages
        ]
    return {
        "index": index,
        "example": json.dumps(content, ensure_ascii=False),
        "codes": [grid.ravel().astype(np.int32).tolist() for grid in codes],
        "shapes": [list(grid.shape) for grid in codes],
    }


def from_record(record: dict[str, Any]) -> Example:
    """The example that `to_record` was given, with `Codes` for its images."""
    grids = [
        Codes(np.asarray(codes, dtype=np.int64).reshape(shape))
        for codes, shape in zip(record["codes"], record["shapes"], strict=True)
    ]

    def parts(spelt: list[Any]) -> tuple[Part, ...]:
        return tuple(part if isinstance(part, str) else grids[part] for part in spelt)

    content = json.loads(record["example"])
    if content and isinstance(content[0], dict):
        return Chat(tuple(Message(m["role"], parts(m["parts"]), m["weight"]) for m in content))
    return Document(parts(content))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `codes.json` says; `ConfigError` where there is none."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no readable {MANIFEST}; make it with cantata tokenize") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{folder / MANIFEST} is no JSON object; make it with cantata tokenize")
    return found


class TokenizedImages:
    """Examples with images as codes, from a folder that `cantata tokenize` made.

    Args:
        path: the folder.
        source: which of its sources.
        order: `text_first` to learn images from texts, `image_first` the other way, `as_is` as it came;
            conversations always stay as they came.
        split: `train`, `held_out` or `all`.
        held_out_share: share of the examples that `held_out` gets, chosen by a hash of their index in the
            source that was tokenised: the same ones as there, where all of it was tokenised.

    Raises `ConfigError` where the folder is not there or unfinished, or has no such source.
    """

    def __init__(self, path: str, source: str, order: Order, split: Split, held_out_share: float) -> None:
        folder = asset(path)
        self.manifest = read_manifest(folder)
        sources = self.manifest.get("sources")
        if not isinstance(sources, dict):
            raise ConfigError(f"{folder / MANIFEST} names no sources; make it with cantata tokenize")
        if source not in sources:
            raise ConfigError(f"{path} has no source {source}{hint(source, sources)}")
        self.path = folder
        self.order = order
        described = sources[source]
        self._files = [folder / source / f"{number:05d}.parquet" for number in range(described["shards"])]
        missing = [file for file in self._files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{path} is unfinished: {missing[0].name} of {source} is not there; run cantata tokenize "
                "again"
            )
        rows, held = [], set(split_indices(described["samples"], split, held_out_share).tolist())
        for number, file in enumerate(self._files):
            try:
                indices = parquet.read_table(file, columns=["index"])["index"].to_pylist()
            except (OSError, arrow.ArrowInvalid) as error:
                raise ConfigError(
                    f"{file} is no shard of codes ({error}); remove it and run cantata tokenize again"
                ) from error
            rows += [(number, row) for row, index in enumerate(indices) if index in held]
        self._rows = np.array(rows, dtype=np.int32).reshape(-1, 2)
        self._handles = PerProcess()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        number, row = (int(value) for value in self._rows[index])
        file = self._handle(number)
        group, start = 0, 0
        while row >= start + file.metadata.row_group(group).num_rows:
            start += file.metadata.row_group(group).num_rows
            group += 1
        table = file.read_row_group(group, use_threads=False)
        [record] = table.slice(row - start, 1).to_pylist()
        example = from_record(record)
        if isinstance(example, Chat) or self.order is Order.as_is:
            return example
        texts = [part for part in example.parts if isinstance(part, str)]
        images = [part for part in example.parts if not isinstance(part, str)]
        if not texts or not images:
            raise DataError("no text beside the image" if images else "no image", f"order={self.order.value}")
        parts = (*texts, *images) if self.order is Order.text_first else (*images, *texts)
        return replace(example, parts=parts)

    def _handle(self, number: int) -> parquet.ParquetFile:
        """An open shard: its index alone is kept, as shuffled reading touches all of a large set."""
        files = self._handles.get(dict)
        if number not in files:
            files[number] = parquet.ParquetFile(self._files[number], memory_map=True)
        return files[number]
