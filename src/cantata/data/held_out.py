"""Every held-out sample once, source by source, packed as in training and shared by the ranks.

R  rows of a source     W  data-parallel ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from cantata.core.errors import RunError
from cantata.core.samples import DataError, Document, Example, PixelSample, Sample
from cantata.data.collate.base import Collator
from cantata.data.reading import Drop, Reader, Source


class HeldOut:
    """The evaluation batches of one rank; iterate it as often as you like.

    Of each source rank r gets rows r, r + W, ...; where rows do not go round, the last batches are filled up
    with empty rows, so that every rank gets the same number of batches and collectives stay in step. The
    first pass encodes everything on every rank to learn the lengths; later ones only the rank's own rows.

    Args:
        sources: the datasets by name.
        collator: encodes and packs.
        sequence_length: what a row holds: tokens, or images.
        micro_batch_size: rows of a batch.
        window: samples to choose from when a row is filled.
        rank: this data-parallel rank.
        world_size: W.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        collator: Collator,
        *,
        sequence_length: int,
        micro_batch_size: int,
        window: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.collator: Any = collator
        self.dropped: dict[str, dict[str, int]] = {}
        """Samples left out in the first pass, by source and reason."""
        self._reader = Reader(sources, collator.encode, sequence_length, "data.held_out")
        self._micro_batch_size = micro_batch_size
        self._window = window
        self._rank = rank
        self._world_size = world_size
        self._plans: dict[str, list[tuple[str, ...]]] = {}

    def __len__(self) -> int:
        """Samples, the dropped ones too."""
        return sum(self.sizes().values())

    def sizes(self) -> dict[str, int]:
        """Samples of each source, the dropped ones too."""
        return {name: len(source.dataset) for name, source in self._reader.sources.items()}

    def captioned(self, count: int) -> list[tuple[str, Document]]:
        """Up to `count` readable documents that hold an image and text, with their keys.

        A source of text alone yields none.
        """
        found = [
            (f"{name}:{index}", example)
            for name, index, example in self.spread(count)
            if isinstance(example, Document) and _has_both(example)
        ]
        return found[:count]

    def spread(self, count: int) -> Iterator[tuple[str, int, Example]]:
        """Source, index and example of `count` samples of each source, if readable.

        They are spread evenly; of a sequential source they are the first.
        """
        for name, source in sorted(self._reader.sources.items()):
            size = len(source.dataset)
            asked = min(count, size)
            for number in range(asked):
                index = number if source.is_sequential else number * size // asked
                try:
                    yield name, index, source.dataset[index]
                except DataError:
                    continue

    def passes(self) -> Iterator[tuple[str, Iterator[Any]]]:
        """Each source's name with its batches."""
        return ((name, self.batches(name)) for name in self._reader.sources)

    def batches(self, source: str) -> Iterator[Any]:
        """This rank's batches of one source."""
        if source not in self._plans:
            self._plans[source] = self._pack(source)
        plan = self._plans[source]
        rounds = -(-len(plan) // self._world_size)
        mine = plan[self._rank :: self._world_size]
        rows = iter([*mine, *[()] * (rounds - len(mine))])
        while batch := list(islice(rows, self._micro_batch_size)):
            batch += [()] * (self._micro_batch_size - len(batch))
            packed = [self._row(keys) for keys in batch]
            yield self.collator.collate(packed, self._reader.sequence_length)

    def __iter__(self) -> Iterator[Any]:
        for source in self._reader.sources:
            yield from self.batches(source)

    def _pack(self, source: str) -> list[tuple[str, ...]]:
        """The keys of the samples of each of the source's R rows."""
        size = len(self._reader.sources[source].dataset)
        packer = self.collator.row_maker(
            lambda index: self._reader.read(source, index),
            stream=0,
            stride=1,
            sequence_length=self._reader.sequence_length,
            window=self._window,
            patience=size + 1,
            check=self._reader.check_skipped,
            end=size,
        )
        plan = []
        while row := packer.next_row():
            plan.append(row.info.samples)
        self.dropped |= packer.state()["dropped"]
        return plan

    def _row(self, keys: tuple[str, ...]) -> Any:
        return self.collator.row([self._sample(key) for key in keys])

    def _sample(self, key: str) -> Sample | PixelSample:
        name, _, index = key.rpartition(":")
        sample = self._reader.read(name, int(index))
        if isinstance(sample, Drop):
            raise RunError(f"held-out sample {key} was read before and now is not: {sample.reason}")
        return sample


def _has_both(document: Document) -> bool:
    kinds = {isinstance(part, str) for part in document.parts}
    return kinds == {True, False}
