"""What training would read: the first rows as the loader packs them, and samples of each source as tensors.

Nothing here is told by the config or the processor alone: tokens, weights and pixels are taken from the
batches that the model would get.

T  tokens
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cantata.core.build import build
from cantata.core.errors import RunError
from cantata.core.samples import Example, ImagePatches, Processor, Sample
from cantata.core.types import IMAGE, MODALITIES, Batch, RowInfo
from cantata.data.assembly import build_held_out, build_loader, build_sources
from cantata.data.collate.packed import PackedCollator, Row
from cantata.data.reading import Drop, Reader
from cantata.models.protocol import LanguageModel
from cantata.train.stage import LanguageStage, build_model

TRIES = 16
"""Samples of a source that are read, at most, to find one that can be shown."""

TOO_LONG = "too long"


class Token(NamedTuple):
    """A token, or the few that share a character."""

    text: str
    ids: tuple[int, ...]
    weight: float
    """Weight of predicting it in the loss."""
    is_special: bool


class Picture(NamedTuple):
    """An image where its placeholders stand, with the pixels that the tower gets."""

    image: Image.Image
    patches: int
    features: int
    modality: str


@dataclass(frozen=True)
class Shown:
    """A sample as the model reads it."""

    key: str
    items: tuple[Token | Picture, ...]
    tokens: int
    learned: int


@dataclass
class Tally:
    """What became of the samples of a source that were read."""

    size: int
    share: float
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample that could be encoded, the too long ones too."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of the samples left out, by reason."""
    tokens: int = 0
    """Tokens in the rows."""
    learned: int = 0
    """Those of them that are predicted with a weight."""
    weight: float = 0.0
    """Their weights' sum."""
    shown: list[Shown] = field(default_factory=list)

    def drop(self, reason: str, index: int) -> None:
        self.dropped.setdefault(reason, []).append(index)

    @property
    def kept(self) -> int:
        return len(self.lengths) - len(self.dropped.get(TOO_LONG, []))

    @property
    def read(self) -> int:
        return self.kept + sum(map(len, self.dropped.values()))


@dataclass
class Inspection:
    """Everything that is shown."""

    sequence_length: int
    sources: dict[str, Tally]
    held_out: dict[str, int]
    """Samples by name of the held-out source; they are not read."""
    rows: int = 0
    used: int = 0
    """Tokens in the rows that are no padding."""
    modalities: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    """Tokens in the rows by modality."""
    seconds: float = 0.0
    """Time that reading and packing the rows took in one process."""
    encoded: int = 0
    """Tokens of all samples that were encoded for it."""
    notes: list[str] = field(default_factory=list)

    @property
    def efficiency(self) -> float:
        return self.used / max(1, self.rows * self.sequence_length)


class Observed(PackedCollator):
    """The stage's collator, with a record of what it encodes."""

    def __init__(self, inner: PackedCollator, tallies: Mapping[str, Tally], sequence_length: int) -> None:
        super().__init__(inner.processor)
        self._inner = inner
        self._tallies = tallies
        self._length = sequence_length

    def encode(self, example: Example, key: str) -> Sample:
        sample = self._inner.encode(example, key)
        name, _, index = key.rpartition(":")
        tally = self._tallies.get(name)
        if tally is not None:  # weights that count tokens are found by reading too, before there are tallies
            tally.lengths.append(len(sample))
            if len(sample) > self._length:
                tally.drop(TOO_LONG, int(index))
        return sample

    def row(self, samples: Sequence[Sample], info: RowInfo | None = None) -> Row:
        return self._inner.row(samples, info)

    def collate(self, rows: Sequence[Row], sequence_length: int) -> Batch:
        return self._inner.collate(rows, sequence_length)


def inspect_stage(stage: LanguageStage, samples: int, rows: int) -> Inspection:
    """Read `rows` rows as training would, and `samples` samples of each source to show.

    Opens every file of the stage and builds the model without weights, so that all that training refuses
    about its data is refused here. Raises `ConfigError`; what would stop the run later becomes a note.
    """
    model = build_model(stage)
    assert isinstance(model, LanguageModel)
    collator: PackedCollator = build(stage.collator)
    model.check_processor(collator.processor)
    length = stage.train.sequence_length
    tallies: dict[str, Tally] = {}
    observed = Observed(collator, tallies, length)
    # One process without a cache, so that the time is a worker's; no limit: what is left out is to be seen.
    sources = {name: replace(source, max_skipped=None) for name, source in stage.data.sources.items()}
    data = replace(stage.data, num_workers=0, cache=None, sources=sources)
    shape = {"sequence_length": length, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    loader = build_loader(data, observed, seed=stage.seed, **shape)
    tallies.update({name: Tally(size, share) for name, size, share in loader.shares()})
    found = Inspection(length, tallies, build_held_out(data, collator, **shape).sizes())
    _read_rows(found, iter(loader), rows)
    built = build_sources(data.sources, "data.sources", stage.seed, data.cache, collator.processor)
    reader = Reader(built, observed.encode, length, "data.sources")
    for name, tally in tallies.items():
        _read_samples(found, name, tally, reader, collator, samples)
        limit, skipped = stage.data.sources[name].max_skipped, tally.read - tally.kept
        if limit is not None and skipped > limit * tally.read:
            found.notes.append(
                f"{skipped} of {tally.read} samples of {name} were left out; more than its "
                f"max_skipped={limit:g} would stop training"
            )
    return found


def _read_rows(found: Inspection, batches: Iterator[Batch], rows: int) -> None:
    started = time.perf_counter()
    try:
        for batch in islice(batches, rows):
            _count(found, batch)
    except RunError as error:
        found.notes.append(f"training would stop after {found.rows} rows: {error}")
    found.seconds = time.perf_counter() - started
    found.encoded = sum(sum(tally.lengths) for tally in found.sources.values())


def _count(found: Inspection, batch: Batch) -> None:
    found.rows += len(batch.rows)
    found.used += batch.samples.total
    for modality, name in enumerate(MODALITIES):
        found.modalities[name] += int((batch.modality_ids_T == modality).sum())
    weight_T = weights(batch)
    keys = [key for row in batch.rows for key in row.samples]
    parts = torch.split(weight_T[: batch.samples.total], list(batch.samples.lengths))
    for key, part in zip(keys, parts, strict=True):
        tally = found.sources[key.rpartition(":")[0]]
        tally.tokens += len(part)
        tally.learned += int((part > 0).sum())
        tally.weight += float(part.sum())
    for row in batch.rows:
        for name, reason, index in row.dropped:
            if reason != TOO_LONG:  # counted where it was encoded
                found.sources[name].drop(reason, index)


def _read_samples(
    found: Inspection, name: str, tally: Tally, reader: Reader, collator: PackedCollator, samples: int
) -> None:
    """Samples to show, evenly spread over the source; one that cannot be read makes way for the next."""
    tried: set[int] = set()
    try:
        for start in (number * tally.size // samples for number in range(samples)):
            for index in ((start + step) % tally.size for step in range(min(TRIES, tally.size))):
                if index in tried:
                    continue
                if len(tried) == TRIES + samples:
                    return
                tried.add(index)
                sample = reader.read(name, index)
                if isinstance(sample, Sample):
                    batch = collator.collate([collator.row([sample])], len(sample))
                    tally.shown.append(show(sample.key, batch, collator.processor))
                    break
                assert isinstance(sample, Drop)
                if sample.reason != TOO_LONG:
                    tally.drop(sample.reason, index)
    except RunError as error:
        found.notes.append(f"training would stop: {error}")


def weights(batch: Batch) -> torch.Tensor:
    """Weight of predicting each token, fp32, (T,); a batch says it where the prediction is made."""
    weight_T = torch.zeros(len(batch.input_ids_T) + 1)
    given = batch.target_weight_N
    weight_T[batch.target_index_N + 1] = torch.ones(()) if given is None else given
    return weight_T[:-1]


def show(key: str, batch: Batch, processor: Processor) -> Shown:
    """The only sample of a batch, its tokens spelt and its pixels laid out again."""
    ids, weight = batch.input_ids_T.tolist(), weights(batch).tolist()
    pictures = _pictures(batch, processor)
    items: list[Token | Picture] = []
    pending: list[int] = []
    awaited = 0
    for place, token in enumerate(ids):
        if token == processor.image_token_id:
            if not awaited:
                picture = next(pictures)
                items.append(picture)
                awaited = picture.features
            awaited -= 1
            continue
        pending.append(token)
        text = processor.spell(pending)
        # Half a character waits for the rest of it, unless its weight is another.
        is_half = text.endswith("\ufffd") and len(pending) < 4
        if is_half and place + 1 < len(ids) and weight[place + 1] == weight[place]:
            continue
        is_special = bool(text) and not processor.decode(pending)
        items.append(Token(text, tuple(pending), weight[place], is_special))
        pending = []
    # Of pairs, whose images have no place among the tokens.
    items = [*pictures, *items]
    return Shown(key, tuple(items), len(ids), sum(value > 0 for value in weight))


def _pictures(batch: Batch, processor: Processor) -> Iterator[Picture]:
    images = batch.images
    patches = images.patches_PC.numpy().astype(np.uint8, copy=False)
    positions: NDArray[np.int64] = images.position_ids_P.numpy()
    modality = batch.modality_ids_T[images.token_index_Q].tolist()
    start = feature = 0
    for count, features in zip(images.patches.lengths, images.features.lengths, strict=True):
        one = slice(start, start + count)
        image = processor.picture(ImagePatches(patches[one], positions[one], features))
        kind = modality[feature] if features else IMAGE
        yield Picture(image, count, features, MODALITIES[kind])
        start, feature = start + count, feature + features
