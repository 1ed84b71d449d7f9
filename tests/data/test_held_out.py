from collections import Counter

import pytest

from cantata.data.collate import PackedCollator
from cantata.data.held_out import HeldOut
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


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_source_in_a_pass_of_its_own(world_size: int) -> None:
    passes = [dict(held_out(rank, world_size).passes()) for rank in range(world_size)]
    for name, count in (("a", 22), ("b", 6)):
        batches = [list(one[name]) for one in passes]
        assert len({len(own) for own in batches}) == 1, "ranks stay in step within a source"
        lengths = [n for own in batches for batch in own for n in batch.samples.lengths]
        assert len(lengths) == count
        assert name == "a" or set(lengths) == {10}


def test_examples_are_spread_evenly_and_unreadable_ones_passed_over() -> None:
    found = [(name, index) for name, index, _ in held_out().spread(8)]
    assert found == [("a", 0), ("a", 6), ("a", 9), ("a", 12), ("a", 15), ("a", 18), ("a", 21)] + [
        ("b", index) for index in range(6)
    ]


def test_of_a_stream_the_first_examples_are_taken() -> None:
    class Streamed(Words):
        is_sequential = True

    found = held_out(sources={"a": source(Streamed("a", [5] * 100))}).spread(3)
    assert [index for _, index, _ in found] == [0, 1, 2]


def test_nothing_held_out() -> None:
    assert list(held_out(sources={})) == []
    empty = {"b": source(Words("b", []))}
    assert list(held_out(sources=empty)) == []


def test_everything_dropped() -> None:
    assert list(held_out(sources={"b": source(Words("b", [99, 99]))})) == []
