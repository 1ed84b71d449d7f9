"""`cantata tokenize tokenizer=RUN data=... out=DIR`: images and clips into codes, once and for all.

Each source becomes a folder of shards. A shard that is there is not made again, so the same command goes on
where it stopped; several processes, started by any launcher, share the shards.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from cantata.core import dist
from cantata.core.build import build
from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import Example
from cantata.core.schema import slot
from cantata.data.assembly import build_sources
from cantata.data.collate.pixels import ImageCollator, visual_parts
from cantata.data.config import ImageDataConfig
from cantata.data.handover import leave_signals_to_the_trainer, unchanged
from cantata.data.reading import Drop, Reader
from cantata.data.tokenized import MANIFEST, SCHEMA, read_manifest, to_record
from cantata.models.protocol import ImageTokenizer
from cantata.tools.open_tokenizer import OpenedTokenizer, open_tokenizer
from cantata.train.reconstruction import normalise

DROPPED = b"dropped"
"""Key of a shard's metadata: what was left out, by reason."""


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Every key of tokenising."""

    name: str
    out: Path
    """The folder of codes."""
    tokenizer: Path
    """A run of `cantata vq`, one of its checkpoints, or a folder that was exported or published."""
    data: ImageDataConfig
    """Its `sources` are tokenised, whole; `augment` and weights do not count."""
    collator: dict[str, Any] = slot(runtime=("grid",))
    batch_size: int
    """Images of one size that go through the tokenizer at once."""
    shard_size: int
    """Examples of a shard."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "shard_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 1")


@dataclass(frozen=True)
class Visual:
    """An example and the pixels of its images, each at the nearest size."""

    example: Example
    pixels: list[NDArray[np.uint8]]

    def __len__(self) -> int:
        return 1


class Shard(NamedTuple):
    """A run of indices of a source, and the file that their codes go into."""

    source: str
    indices: range
    path: Path


class Examples(Dataset[Any]):
    """The examples of a shard, for worker processes: (index, `Visual` or `Drop`)."""

    def __init__(self, reader: Reader, shard: Shard) -> None:
        self._reader = reader
        self._shard = shard

    def __len__(self) -> int:
        return len(self._shard.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self._shard.indices[place]
        return index, self._reader.read(self._shard.source, index)


class Tokenizing:
    """Examples in, records with codes out; pixels wait until as many of one size have come as go together."""

    def __init__(self, model: ImageTokenizer, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._waiting: dict[tuple[int, ...], list[tuple[int, int, NDArray[np.uint8]]]] = {}
        self._examples: dict[int, Example] = {}
        self._codes: dict[tuple[int, int], NDArray[np.int64]] = {}

    def add(self, index: int, visual: Visual) -> None:
        """Take in an example."""
        self._examples[index] = visual.example
        for place, pixels in enumerate(visual.pixels):
            waiting = self._waiting.setdefault(pixels.shape, [])
            waiting.append((index, place, pixels))
            if len(waiting) == self._batch_size:
                self._encode(pixels.shape)

    def records(self) -> list[dict[str, Any]]:
        """Everything that was added, in the order of indices."""
        for size in list(self._waiting):
            self._encode(size)
        return [
            to_record(
                index, example, [self._codes[index, place] for place in range(len(visual_parts(example)))]
            )
            for index, example in sorted(self._examples.items())
        ]

    @torch.no_grad()
    def _encode(self, size: tuple[int, ...]) -> None:
        waiting = self._waiting.pop(size)
        pixels = torch.from_numpy(np.stack([pixels for _, _, pixels in waiting])).to(dist.device())
        codes = self._model.encode(normalise(pixels)).cpu().numpy()
        for (index, place, _), grid in zip(waiting, codes, strict=True):
            self._codes[index, place] = grid


def tokenize(config: TokenizeConfig) -> int:
    """Make every shard that is not there; a collective. Returns 0.

    Raises:
        ConfigError: no tokenizer, sizes that it cannot take, or a folder that holds other codes.
        RunError: a sample that its source does not let pass, or a disk that refuses.
    """
    opened = open_tokenizer(config.tokenizer, dist.device())
    collator: ImageCollator = build(config.collator, grid=opened.model.grid)
    sources = build_sources(config.data.sources, "data.sources", seed=0)
    reader = Reader(sources, lambda example, key: _visual(example, collator), 1, "data.sources")
    sizes = {name: len(source.dataset) for name, source in sources.items()}
    shards = {name: _shards(config, name, size) for name, size in sizes.items()}
    _claim(config.out, _manifest(config, opened, collator, sizes))
    began, made, dropped = time.monotonic(), 0, Counter[str]()
    everything = [shard for part in shards.values() for shard in part]
    for shard in everything[dist.rank() :: dist.world_size()]:
        if not shard.path.is_file():
            made += _write(shard, opened.model, reader, config)
        dropped.update(json.loads(parquet.read_schema(shard.path).metadata[DROPPED]))
    [total] = dist.all_reduce_sum([float(made)])
    everywhere = sum(
        (Counter(json.loads(text)) for text in dist.gather_strings(json.dumps(dropped))), Counter()
    )
    if dist.is_main():
        seconds = time.monotonic() - began
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"{config.out}: {sum(sizes.values()):,} examples in {len(everything)} shards; {int(total):,} "
            f"made now ({total / max(seconds, 1e-9):.0f} a second), tokenizer {opened.digest[:12]}"
        )
        for reason, number in sorted(everywhere.items()):
            console.print(f"left out {number}: {reason}")
    return 0


def _write(shard: Shard, model: ImageTokenizer, reader: Reader, config: TokenizeConfig) -> int:
    """Make one shard; returns its examples."""
    tokenizing, dropped = Tokenizing(model, config.batch_size), Counter[str]()
    for index, item in _read(reader, shard, config.data):
        if isinstance(item, Drop):
            dropped[item.reason] += 1
        else:
            tokenizing.add(index, item)
    reader.check_skipped({shard.source: len(shard.indices)}, {shard.source: dict(dropped)})
    records = tokenizing.records()
    table = arrow.Table.from_pylist(records, schema=SCHEMA)
    table = table.replace_schema_metadata({DROPPED: json.dumps(dropped).encode()})
    beside = shard.path.with_suffix(".incomplete")
    try:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, beside, row_group_size=256, compression="zstd")
        beside.replace(shard.path)
    except OSError as error:
        raise RunError(f"{shard.path}: cannot be written ({error.strerror or error})") from error
    return len(records)


def _read(reader: Reader, shard: Shard, data: ImageDataConfig) -> Iterator[tuple[int, Any]]:
    has_workers = data.num_workers > 0
    return iter(
        DataLoader(
            Examples(reader, shard),
            batch_size=None,
            collate_fn=unchanged,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch if has_workers else None,
            multiprocessing_context="fork" if has_workers else None,
            worker_init_fn=leave_signals_to_the_trainer,
        )
    )


def _visual(example: Example, collator: ImageCollator) -> Any:
    return Visual(example, [collator.pixels(part) for part in visual_parts(example)])


def _shards(config: TokenizeConfig, source: str, size: int) -> list[Shard]:
    starts = range(0, size, config.shard_size)
    return [
        Shard(
            source,
            range(start, min(start + config.shard_size, size)),
            config.out / source / f"{number:05d}.parquet",
        )
        for number, start in enumerate(starts)
    ]


def _manifest(
    config: TokenizeConfig, opened: OpenedTokenizer, collator: ImageCollator, sizes: dict[str, int]
) -> dict[str, Any]:
    quantizer = opened.model.quantizer
    return {
        "tokenizer": opened.digest,
        "num_codes": quantizer.num_codes,
        "num_codebooks": quantizer.num_codebooks,
        "sizes": [list(size) for size in collator.sizes],
        "frames": collator.frames,
        "shard_size": config.shard_size,
        "sources": {
            name: {
                "samples": size,
                "shards": -(-size // config.shard_size),
                "dataset": config.data.sources[name].dataset,
            }
            for name, size in sizes.items()
        },
    }


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Write `codes.json` where there is none; `ConfigError` where there is another one."""
    if dist.is_main() and not (out / MANIFEST).exists():
        beside = out / f"{MANIFEST}.incomplete"
        try:
            out.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            beside.replace(out / MANIFEST)
        except OSError as error:
            raise ConfigError(f"out={out} cannot be written ({error.strerror or error})") from error
    dist.barrier()
    found = read_manifest(out)
    wanted = json.loads(json.dumps(manifest))
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        raise ConfigError(
            f"{out} holds codes of another {', '.join(different)}; choose another folder with out=, or "
            "remove it"
        )
