"""What every maker of rows keeps: its state, its drops, its end; by the plainest, of pairs in their order."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import Sample
from cantata.data.reading import Drop
from cantata.data.rows import PackedRow, RowMaker, check_states


class Pairs(RowMaker):
    """Two samples a row, in their order; fewer at the end."""

    def _choose(self) -> list[Any]:
        while len(self._pending) < 2 and self._read_on():
            pass
        chosen, self._pending = self._pending[:2], self._pending[2:]
        return [sample for _, sample in chosen]


def fetch(broken: Callable[[int], bool]) -> Callable[[int], Sample | Drop]:
    def read(position: int) -> Sample | Drop:
        source = "even" if position % 2 == 0 else "odd"
        if broken(position):
            return Drop(source, "corrupt image", position)
        ids = np.full(1, position, dtype=np.int32)
        return Sample(f"{source}:{position}", ids, np.ones(1, np.float32), np.zeros(1, np.int8), ())

    return read


def pairs(broken: Callable[[int], bool] = lambda position: False, **changes: Any) -> Pairs:
    settings: dict[str, Any] = {
        "stream": 0,
        "stride": 1,
        "sequence_length": 20,
        "window": 4,
        "patience": 5,
        "check": lambda *_: None,
    }
    return Pairs(fetch(broken), **(settings | changes))


def rows(maker: Pairs, count: int) -> list[PackedRow]:
    return [row for _ in range(count) if (row := maker.next_row()) is not None]


def test_a_stream_reads_every_nth_position_from_its_own_on() -> None:
    found = rows(pairs(stream=1, stride=3), 2)
    assert [row.info.samples for row in found] == [("odd:1", "even:4"), ("odd:7", "even:10")]
    assert [row.info.stream for row in found] == [1, 1]
    assert found[-1].info.state == {"next": 13, "pending": [], "read": {"odd": 2, "even": 2}, "dropped": {}}


def test_drops_are_told_once_with_the_row_and_counted_by_source() -> None:
    found = rows(pairs(lambda position: position in (1, 2, 5)), 3)
    assert [row.info.dropped for row in found] == [
        (("odd", "corrupt image", 1), ("even", "corrupt image", 2)),
        (("odd", "corrupt image", 5),),
        (),
    ]
    state = found[-1].info.state
    assert state["dropped"] == {"odd": {"corrupt image": 2}, "even": {"corrupt image": 1}}
    assert state["read"] == {"even": 5, "odd": 4}


def test_counts_are_checked_at_each_drop() -> None:
    seen: list[tuple[dict[str, int], int]] = []

    def check(read: Mapping[str, int], dropped: Mapping[str, Mapping[str, int]]) -> None:
        seen.append((dict(read), sum(sum(reasons.values()) for reasons in dropped.values())))

    rows(pairs(lambda position: position in (1, 2, 5), check=check), 3)
    assert seen == [({"even": 1, "odd": 1}, 1), ({"even": 2, "odd": 1}, 2), ({"even": 3, "odd": 3}, 3)]


def test_what_a_check_raises_ends_the_run() -> None:
    def check(*_: object) -> None:
        raise RunError("too many")

    with pytest.raises(RunError, match="too many"):
        pairs(lambda position: position == 0, check=check).next_row()


@pytest.mark.parametrize("interrupted", range(5))
def test_a_state_continues_with_the_same_rows(interrupted: int) -> None:
    """After JSON, in another maker; what is pending is read again."""
    broken = {3, 4, 8}.__contains__
    whole = rows(pairs(broken), 6)
    state = pairs(broken).state() if not interrupted else whole[interrupted - 1].info.state
    resumed = pairs(broken)
    resumed.load(json.loads(json.dumps(state)))
    assert [row.info for row in rows(resumed, 6 - interrupted)] == [row.info for row in whole[interrupted:]]


def test_states_do_not_change_afterwards() -> None:
    maker = pairs({1}.__contains__)
    row = maker.next_row()
    assert row is not None
    before = copy.deepcopy(row.info.state)
    rows(maker, 5)
    assert row.info.state == before
    state = maker.state()
    resumed = pairs({1}.__contains__)
    resumed.load(state)
    rows(resumed, 3)
    assert state == maker.state(), "a state is not changed by whoever loads it"


def test_finite_data_ends_with_every_sample_out() -> None:
    found = rows(pairs(end=5), 9)
    assert [row.info.samples for row in found] == [("even:0", "odd:1"), ("even:2", "odd:3"), ("even:4",)]
    assert rows(pairs(end=0), 3) == []


def test_only_drops_is_an_error_not_a_hang() -> None:
    """As many in a row; one good sample begins the count anew."""
    message = r"the last 5 samples were all dropped, the newest odd:5 \(corrupt image\); check the data"
    with pytest.raises(RunError, match=message):
        rows(pairs(lambda position: position > 0), 2)
    assert rows(pairs(lambda position: position % 5 != 0), 2)


def test_a_pending_sample_that_vanished() -> None:
    state = {"next": 4, "pending": [1], "read": {"s": 4}, "dropped": {}}
    with pytest.raises(RunError, match=r"sample odd:1 was read before the checkpoint and now is not"):
        pairs({1}.__contains__).load(state)


def test_states_are_whole_or_of_an_older_version() -> None:
    state = pairs().state()
    check_states([state, state])
    check_states([])
    older = {name: value for name, value in state.items() if name in ("next", "pending")}
    with pytest.raises(ConfigError, match=r"older version \(its data state lacks dropped, read\); start"):
        check_states([state, older])
