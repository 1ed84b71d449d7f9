import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cantata.core.samples import PixelSample
from cantata.data.reading import Drop
from cantata.data.rows import PackedRow
from cantata.data.size_groups import SizeGroups


def groups(sides: list[int], **changes: object) -> SizeGroups:
    """Images whose sides repeat for ever; 0 stands for one that is dropped."""

    def fetch(position: int) -> PixelSample | Drop:
        side = sides[position % len(sides)]
        if not side:
            return Drop("s", "corrupt image", position)
        return PixelSample(f"s:{position}", np.zeros((1, 3, side, side), np.uint8))

    settings = {
        "stream": 0,
        "stride": 1,
        "sequence_length": 3,
        "window": 1,
        "patience": 50,
        "check": lambda *_: None,
    }
    return SizeGroups(fetch, **(settings | changes))  # type: ignore[arg-type]


def rows(source: SizeGroups, count: int) -> list[PackedRow]:
    return [row for _ in range(count) if (row := source.next_row())]


def test_the_size_that_is_full_first_goes_first() -> None:
    first, second = rows(groups([2, 4, 4, 2, 4]), 2)
    assert first.info.samples == ("s:1", "s:2", "s:4")
    assert first.info.state["pending"] == [0, 3]
    assert second.info.samples == ("s:0", "s:3", "s:5")


def test_what_is_left_at_the_end_makes_shorter_rows() -> None:
    found = rows(groups([2, 4, 2, 2, 4, 2], end=6), 9)
    assert [row.info.samples for row in found] == [("s:0", "s:2", "s:3"), ("s:1", "s:4"), ("s:5",)]


sides_of = st.lists(st.integers(0, 3), min_size=1, max_size=20).filter(any)


@settings(max_examples=60)
@given(sides_of, st.integers(1, 4), st.integers(0, 6))
def test_rows_are_of_one_size_and_resume_exactly(sides: list[int], size: int, stop: int) -> None:
    whole = rows(groups(sides, sequence_length=size), 10)
    for row in whole:
        assert len({sample.size for sample in row.samples}) == 1
        assert len(row.samples) == size
    keys = [key for row in whole for key in row.info.samples]
    assert len(set(keys)) == len(keys)
    second = groups(sides, sequence_length=size)
    if stop:
        second.load(json.loads(json.dumps(whole[stop - 1].info.state)))
    assert [row.info for row in rows(second, 10 - stop)] == [row.info for row in whole[stop:]]


@settings(max_examples=40)
@given(sides_of, st.integers(1, 4))
def test_finite_data_comes_once_and_whole(sides: list[int], size: int) -> None:
    found = rows(groups(sides, sequence_length=size, end=len(sides)), len(sides) + 1)
    keys = sorted(key for row in found for key in row.info.samples)
    assert keys == sorted(f"s:{index}" for index, side in enumerate(sides) if side)
