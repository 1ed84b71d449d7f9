from collections import Counter

import pytest

from cantata.data.collate import PackedCollator
from cantata.data.held_out import HeldOut, interleaved
from cantata.data.reading import Source
from tests.data.helpers import Letters, Words, assert_same, source


def words() -> dict[str, Source]:
    return {
        "a": source(Words("a", [3 + 7 * i % 29 for i in range(23)] + [50], broken=[3])),
        "b": source(Words("b", [10] * 6)),
    }


def held_out(rank: int = 0, world_size: int = 1, micro_batch_size: int = 2, **changes: object) -> HeldOut:
    settings = {"sources": words(), "collator": PackedCollator(Letters()), "sequence_length": 32, "window": 4}
    place = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
    return HeldOut(**(settings | place | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 2), (2, 2), (3, 1), (5, 3)])
def test_every_sample_once_over_the_ranks(world_size: int, micro_batch_size: int) -> None:
    per_rank = [list(held_out(rank, world_size, micro_batch_size)) for rank in range(world_size)]
    lengths = Counter(length for batches in per_rank for batch in batches for length in batch.samples.lengths)
    expected = Counter([3 + 7 * i % 29 for i in range(23) if i != 3] + [10] * 6)
    assert lengths == expected
    assert len({len(batches) for batches in per_rank}) == 1
    for batches in per_rank:
        assert {batch.input_ids_T.numel() for batch in batches} == {micro_batch_size * 32}


def test_passes_are_alike_and_drops_counted_once() -> None:
    batches = held_out()
    first, second = list(batches), list(batches)
    for left, right in zip(first, second, strict=True):
        assert_same(left, right)
    assert batches.dropped == {"a": {"corrupt image": 1, "too long": 1}}
    assert len(batches) == 30
    assert batches.sizes() == {"a": 24, "b": 6}


def test_sources_are_evenly_mixed() -> None:
    expected = [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1), ("a", 3)]
    assert interleaved({"a": 4, "b": 2}) == expected


def test_nothing_held_out() -> None:
    assert list(held_out(sources={})) == []
    empty = {"b": source(Words("b", []))}
    assert list(held_out(sources=empty)) == []


def test_everything_dropped() -> None:
    assert list(held_out(sources={"b": source(Words("b", [99, 99]))})) == []
