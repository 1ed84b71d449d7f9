"""`cantata tokenize tokenizer=RUN data=... out=DIR`: images and clips into codes, once and for all.

Each source becomes a folder of shards. A shard that is there is not made again, so the same command goes on
where it stopped; several processes, started by any launcher, share the shards.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from cantata.core import dist
from cantata.core.build import build
from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.core.schema import slot
from cantata.data.assembly import build_sources
from cantata.data.collate.pixels import ImageCollator
from cantata.data.config import ImageDataConfig
from cantata.data.handover import DYING, Failure, arrived, died, serve_the_trainer, unchanged
from cantata.data.reading import Drop, Reader
from cantata.data.tokenized import MANIFEST, SCHEMA, read_manifest
from cantata.models.protocol import ImageTokenizer
from cantata.tools.open_tokenizer import OpenedTokenizer, open_tokenizer
from cantata.tools.tokenizing import Tokenizing, visual
from cantata.train.run_lock import RunLock

ROWS_A_GROUP = 16
"""Examples that are read together, where one is wanted."""
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


class Tally(NamedTuple):
    """Of this rank's shards so far, by source."""

    read: Counter[str]
    left_out: dict[str, Counter[str]]
    """By reason."""

    def add(self, shard: Shard, left_out: dict[str, int]) -> None:
        """Count a shard's examples."""
        self.read[shard.source] += len(shard.indices)
        self.left_out[shard.source].update(left_out)


class Shard(NamedTuple):
    """A run of indices of a source, and the file that their codes go into."""

    source: str
    indices: range
    path: Path


class Examples(Dataset[Any]):
    """The examples of a shard, for worker processes: (index, `Visual`, `Drop` or `Failure`)."""

    def __init__(self, reader: Reader, shard: Shard) -> None:
        self._reader = reader
        self._shard = shard

    def __len__(self) -> int:
        return len(self._shard.indices)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        index = self._shard.indices[place]
        try:
            return index, self._reader.read(self._shard.source, index)
        except CantataError as error:
            # Raised in a worker it would arrive with the traceback in its text.
            return index, Failure(str(error), isinstance(error, ConfigError))


def tokenize(config: TokenizeConfig) -> int:
    """Make every shard that is not there; a collective. Returns 0.

    Raises:
        ConfigError: no tokenizer, sizes that it cannot take, or a folder that holds other codes.
        RunError: a sample that its source does not let pass, or a disk that refuses.
    """
    opened = open_tokenizer(config.tokenizer, dist.device())
    collator: ImageCollator = build(config.collator, grid=opened.model.grid)
    sources = build_sources(config.data.sources, "data.sources", seed=0)
    reader = Reader(sources, lambda example, key: visual(example, collator), 1, "data.sources")
    sizes = {name: len(source.dataset) for name, source in sources.items()}
    shards = {name: _shards(config, name, size) for name, size in sizes.items()}
    with _claimed(config.out, _manifest(config, opened, collator, sizes)):
        return _make(config, opened, reader, shards)


def _make(
    config: TokenizeConfig, opened: OpenedTokenizer, reader: Reader, shards: dict[str, list[Shard]]
) -> int:
    """This rank's share of the shards, and what all ranks did; returns 0."""
    began, made, tally = time.monotonic(), 0, Tally(Counter(), defaultdict(Counter))
    everything = [shard for part in shards.values() for shard in part]
    for shard in everything[dist.rank() :: dist.world_size()]:
        if shard.path.is_file():
            tally.add(shard, _left_out(shard.path))
        else:
            made += _write(shard, opened.model, reader, config, tally)
    examples = sum(len(shard.indices) for shard in everything)
    dropped = sum(tally.left_out.values(), Counter[str]())
    [total] = dist.all_reduce_sum([float(made)])
    everywhere = sum(
        (Counter(json.loads(text)) for text in dist.gather_strings(json.dumps(dropped))), Counter()
    )
    if dist.is_main():
        seconds = time.monotonic() - began
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"{config.out}: {examples:,} examples in {len(everything)} shards; {int(total):,} "
            f"made now ({total / max(seconds, 1e-9):.0f} a second), tokenizer {opened.digest[:12]}"
        )
        for reason, number in sorted(everywhere.items()):
            console.print(f"left out {number}: {reason}")
    return 0


def _write(shard: Shard, model: ImageTokenizer, reader: Reader, config: TokenizeConfig, tally: Tally) -> int:
    """Make one shard; returns its examples."""
    tokenizing, dropped = Tokenizing(model, config.batch_size), Counter[str]()
    with contextlib.closing(_read(reader, shard, config.data)) as items:
        for index, item in items:
            if isinstance(item, Drop):
                dropped[item.reason] += 1
            else:
                tokenizing.add(index, item)
    tally.add(shard, dropped)
    reader.check_skipped(tally.read, {name: dict(reasons) for name, reasons in tally.left_out.items()})
    records = tokenizing.records()
    table = arrow.Table.from_pylist(records, schema=SCHEMA)
    table = table.replace_schema_metadata({DROPPED: json.dumps(dropped).encode()})
    beside = shard.path.with_suffix(".incomplete")
    try:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, beside, row_group_size=ROWS_A_GROUP, compression="zstd")
        beside.replace(shard.path)
    except OSError as error:
        raise RunError(f"{shard.path}: cannot be written ({error.strerror or error})") from error
    return len(records)


def _read(reader: Reader, shard: Shard, data: ImageDataConfig) -> Generator[tuple[int, Any], None, None]:
    """Close it: workers ignore signals, and a process that has one does not exit."""
    has_workers = data.num_workers > 0
    items = iter(
        DataLoader(
            Examples(reader, shard),
            batch_size=None,
            collate_fn=unchanged,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch if has_workers else None,
            multiprocessing_context="fork" if has_workers else None,
            worker_init_fn=serve_the_trainer,
        )
    )
    try:
        for _ in shard.indices:
            try:
                index, item = next(items)
            except DYING as error:
                if not has_workers:
                    raise
                raise died(error) from error
            yield index, arrived(item)
    finally:
        # A traceback that is kept would keep the workers too.
        del items


def _left_out(path: Path) -> dict[str, int]:
    """What a shard that is there lacks; `ConfigError` where it is none."""
    try:
        found: dict[str, int] = json.loads((parquet.read_schema(path).metadata or {})[DROPPED])
    except (OSError, arrow.ArrowInvalid, KeyError) as error:
        raise ConfigError(f"{path} is no shard of codes; remove it, and it will be made again") from error
    return found


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


@contextlib.contextmanager
def _claimed(out: Path, manifest: dict[str, Any]) -> Generator[None, None, None]:
    """Hold the folder for this launch's ranks; `ConfigError` where another does, or made other codes."""
    with contextlib.ExitStack() as closing:
        if dist.is_main():
            try:
                closing.callback(RunLock(out).release)
            except OSError as error:
                raise ConfigError(f"out={out} cannot be written ({error.strerror or error})") from error
        _claim(out, manifest)
        yield


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
