"""Every held-out sample once, packed as in training and shared by the ranks.

R  rows of one pass     W  data-parallel ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from cantata.core.errors import RunError
from cantata.core.samples import DataError, Document, Sample
from cantata.core.types import Batch
from cantata.data.collate.packed import PackedCollator, Row
from cantata.data.packing import Packer
from cantata.data.reading import Drop, Reader, Source


class HeldOut:
    """The evaluation batches of one rank; iterate it as often as you like.

    Rank r gets rows r, r + W, ...; where rows do not go round, the last batches are filled up with empty
    rows, so that every rank gets the same number of batches and collectives stay in step. The first pass
    encodes everything on every rank to learn the lengths; later ones encode only the rank's own rows.

    Args:
        sources: the datasets by name.
        collator: encodes and packs.
        sequence_length: tokens of a row.
        micro_batch_size: rows of a batch.
        window: samples to choose from when a row is filled.
        rank: this data-parallel rank.
        world_size: W.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        collator: PackedCollator,
        *,
        sequence_length: int,
        micro_batch_size: int,
        window: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.collator = collator
        self.dropped: dict[str, dict[str, int]] = {}
        """Samples left out in the first pass, by source and reason."""
        self._reader = Reader(sources, collator.encode, sequence_length, "data.held_out")
        self._micro_batch_size = micro_batch_size
        self._window = window
        self._rank = rank
        self._world_size = world_size
        self._places = interleaved({name: len(source.dataset) for name, source in sources.items()})
        self._plan: list[tuple[str, ...]] | None = None

    def __len__(self) -> int:
        """Samples, the dropped ones too."""
        return len(self._places)

    def sizes(self) -> dict[str, int]:
        """Samples of each source, the dropped ones too."""
        return {name: len(source.dataset) for name, source in self._reader.sources.items()}

    def captioned(self, count: int) -> list[tuple[str, Document]]:
        """Up to `count` readable documents that hold an image and text, with their keys.

        Each source is asked for `count` samples, evenly spread; a source of text alone yields none.
        """
        found: list[tuple[str, Document]] = []
        for name, source in sorted(self._reader.sources.items()):
            size = len(source.dataset)
            for index in range(0, size, max(1, size // count)):
                try:
                    example = source.dataset[index]
                except DataError:
                    continue
                if len(found) < count and isinstance(example, Document) and _has_both(example):
                    found.append((f"{name}:{index}", example))
        return found

    def __iter__(self) -> Iterator[Batch]:
        if self._plan is None:
            self._plan = self._pack()
        rounds = -(-len(self._plan) // self._world_size)
        mine = self._plan[self._rank :: self._world_size]
        rows = iter([*mine, *[()] * (rounds - len(mine))])
        while batch := list(islice(rows, self._micro_batch_size)):
            batch += [()] * (self._micro_batch_size - len(batch))
            packed = [self._row(keys) for keys in batch]
            yield self.collator.collate(packed, self._reader.sequence_length)

    def _pack(self) -> list[tuple[str, ...]]:
        """The keys of the samples of each of the R rows."""
        packer = Packer(
            lambda position: self._reader.read(*self._places[position]),
            stream=0,
            stride=1,
            sequence_length=self._reader.sequence_length,
            window=self._window,
            patience=len(self._places) + 1,
            end=len(self._places),
        )
        plan = []
        while row := packer.next_row():
            plan.append(row.info.samples)
        self.dropped = packer.state()["dropped"]
        return plan

    def _row(self, keys: tuple[str, ...]) -> Row:
        return self.collator.row([self._sample(key) for key in keys])

    def _sample(self, key: str) -> Sample:
        name, _, index = key.rpartition(":")
        sample = self._reader.read(name, int(index))
        if isinstance(sample, Drop):
            raise RunError(f"held-out sample {key} was read before and now is not: {sample.reason}")
        return sample


def interleaved(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Every (source, index) once, the sources evenly mixed, so that short samples fill up after long ones."""
    places = [((index + 0.5) / size, name, index) for name, size in sizes.items() for index in range(size)]
    return [(name, index) for _, name, index in sorted(places)]


def _has_both(document: Document) -> bool:
    kinds = {isinstance(part, str) for part in document.parts}
    return kinds == {True, False}
