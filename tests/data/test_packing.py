import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cantata.core.errors import RunError
from cantata.core.samples import Sample
from cantata.data.packing import Packer
from cantata.data.reading import Drop
from cantata.data.rows import PackedRow


def sample(position: int, length: int) -> Sample:
    ids = np.full(length, position, dtype=np.int32)
    return Sample(f"s:{position}", ids, np.ones(length, bool), np.zeros(length, np.int8), ())


def packer(lengths: list[int], **changes: object) -> Packer:
    """Positions repeat the lengths for ever; 0 stands for a sample that is dropped."""

    def fetch(position: int) -> Sample | Drop:
        length = lengths[position % len(lengths)]
        return sample(position, length) if length else Drop("s", "corrupt image", position)

    settings = {
        "stream": 0,
        "stride": 1,
        "sequence_length": 20,
        "window": 4,
        "patience": 50,
        "check": lambda *_: None,
    }
    return Packer(fetch, **(settings | changes))  # type: ignore[arg-type]


def rows(source: Packer, count: int) -> list[PackedRow]:
    return [row for _ in range(count) if (row := source.next_row())]


def test_first_fit_by_hand() -> None:
    filled = rows(packer([12, 9, 8, 7], window=3), 3)
    assert [row.info.samples for row in filled] == [("s:0", "s:2"), ("s:1", "s:3"), ("s:4", "s:6")]
    assert filled[0].info.state == {"next": 5, "pending": [1, 3, 4], "read": {"s": 5}, "dropped": {}}


lengths_of = st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any)


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 6), st.integers(1, 3))
def test_whole_samples_once_and_never_too_many(lengths: list[int], window: int, stride: int) -> None:
    assume(any((lengths * stride)[stride - 1 :: stride]))
    filled = rows(packer(lengths * stride, window=window, stride=stride, stream=stride - 1), 12)
    taken = [int(name.removeprefix("s:")) for row in filled for name in row.info.samples]
    assert len(set(taken)) == len(taken)
    last = filled[-1].info.state
    read = [
        p for p in range(stride - 1, last["next"], stride) if (lengths * stride)[p % (len(lengths) * stride)]
    ]
    assert sorted(taken + last["pending"]) == read
    for row in filled:
        assert sum(len(one) for one in row.samples) <= 20
        assert all(len(one) for one in row.samples)


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 6))
def test_nothing_waits_for_ever(lengths: list[int], window: int) -> None:
    source = packer(lengths, window=window)
    for before, after in pairwise([source.state(), *(row.info.state for row in rows(source, 12))]):
        if before["pending"]:
            assert before["pending"][0] not in after["pending"]


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 6), st.integers(0, 8))
def test_resume_continues_with_the_same_rows(lengths: list[int], window: int, interrupted: int) -> None:
    whole = rows(packer(lengths, window=window), 12)
    state = packer(lengths, window=window).state() if not interrupted else whole[interrupted - 1].info.state
    resumed = packer(lengths, window=window)
    resumed.load(json.loads(json.dumps(state)))
    rest = rows(resumed, 12 - interrupted)
    assert [row.info.samples for row in rest] == [row.info.samples for row in whole[interrupted:]]
    assert [row.info.state for row in rest] == [row.info.state for row in whole[interrupted:]]


def test_finite_data_ends_with_every_sample_out() -> None:
    filled = rows(packer([6, 6, 6, 6, 0], end=9), 50)
    assert sorted(name for row in filled for name in row.info.samples) == [
        f"s:{p}" for p in (0, 1, 2, 3, 5, 6, 7, 8)
    ]


def test_what_cannot_be_packed_says_how_long_a_row_is() -> None:
    with pytest.raises(RunError, match=r"check the data and train\.sequence_length=20"):
        packer([0]).next_row()
