import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cantata.core.errors import ConfigError
from cantata.data.order import BLOCK, Order, _mix, apportion, mix, permute


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_depends_on_its_key_and_leaves_no_stripes() -> None:
    first = [permute(index, 1000, 1) for index in range(1000)]
    second = [permute(index, 1000, 2) for index in range(1000)]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.15
    assert sum(abs(a - b) == 1 for a, b in pairwise(first)) < 20


def test_vectorised_mix_equals_the_plain_one() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 123456789]
    assert mix(np.array(values, dtype=np.uint64)).tolist() == [_mix(value) for value in values]


sources = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(1, 400), st.floats(0.05, 1.0)), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None)
@given(sources, st.integers(0, 2**31))
def test_every_sample_once_in_each_epoch_of_its_source(given_sources: dict, seed: int) -> None:
    sizes = {name: size for name, (size, _) in given_sources.items()}
    order = Order(sizes, {name: weight for name, (_, weight) in given_sources.items()}, seed)
    seen: dict[str, list[int]] = {name: [] for name in sizes}
    epochs: dict[str, list[int]] = {name: [] for name in sizes}
    for position in range(2 * BLOCK):
        place = order.locate(position)
        seen[place.source].append(place.index)
        epochs[place.source].append(place.epoch)
    for name, size in sizes.items():
        assert epochs[name] == [count // size for count in range(len(seen[name]))]
        for start in range(0, len(seen[name]) - size + 1, size):
            assert sorted(seen[name][start : start + size]) == list(range(size))


def test_shares_hold_in_every_block_and_order_is_shuffled() -> None:
    order = Order({"a": 10, "b": 10}, {"a": 3, "b": 1}, seed=0)
    for block in range(3):
        names = [order.locate(block * BLOCK + offset).source for offset in range(BLOCK)]
        assert Counter(names) == {"a": BLOCK * 3 // 4, "b": BLOCK // 4}
        runs = sum(left != right for left, right in pairwise(names))
        assert runs == pytest.approx(BLOCK * 2 * 0.75 * 0.25, rel=0.15)


def test_seed_epoch_and_block_change_the_order() -> None:
    places = [Order({"a": 50}, {"a": 1}, seed).locate(0) for seed in range(20)]
    assert len({place.index for place in places}) > 8
    order = Order({"a": 50}, {"a": 1}, 0)
    first, second = ([order.locate(e * 50 + i).index for i in range(50)] for e in (0, 1))
    assert first != second


def test_another_source_leaves_a_source_in_its_order() -> None:
    alone = Order({"a": 50}, {"a": 1}, 3)
    mixed = Order({"a": 50, "0": 20}, {"a": 1, "0": 2}, 3)
    of_a = [place.index for place in map(mixed.locate, range(BLOCK)) if place.source == "a"]
    assert of_a == [alone.locate(position).index for position in range(len(of_a))]


def test_a_sequential_source_comes_in_its_own_order_in_every_epoch() -> None:
    sizes, weights = {"a": 50, "b": 70}, {"a": 1, "b": 2}
    order, shuffled = Order(sizes, weights, 3, sequential=["b"]), Order(sizes, weights, 3)
    places = [order.locate(position) for position in range(2 * BLOCK)]
    of_b = [(place.epoch, place.index) for place in places if place.source == "b"]
    assert of_b == [divmod(count, 70) for count in range(len(of_b))]
    for position, place in enumerate(places):
        assert place.source == "b" or place == shuffled.locate(position)


def test_the_description_of_an_order() -> None:
    sizes, weights = {"a": 50, "b": 70}, {"a": 1, "b": 1}
    # As in every checkpoint from before there were sequential sources.
    assert Order(sizes, weights, 3).describe() == {"a": [50, 512], "b": [70, 512]}
    assert Order(sizes, weights, 3, ["b"]).describe() == {"a": [50, 512], "b": [70, 512, "sequential"]}


def test_pickles_and_is_pinned() -> None:
    order = Order({"a": 1000, "b": 5}, {"a": 1.0, "b": 0.25}, seed=1234)
    copy = pickle.loads(pickle.dumps(order))
    places = [order.locate(position) for position in (0, 1, 2, 5000)]
    assert places == [copy.locate(position) for position in (0, 1, 2, 5000)]
    # A change here breaks the resume of every run that exists.
    assert [(place.source, place.index, place.epoch) for place in places] == [
        ("a", 437, 0),
        ("b", 0, 0),
        ("a", 573, 0),
        ("b", 3, 199),
    ]


@given(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=8), st.integers(1, 5000))
def test_apportion_is_whole_and_within_one(weights: list[float], seats: int) -> None:
    counts = apportion(weights, seats)
    assert sum(counts) == seats
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * seats) < 1 + 1e-9


def test_bad_sources() -> None:
    with pytest.raises(ConfigError, match="source b holds no sample"):
        Order({"a": 1, "b": 0}, {"a": 1, "b": 1}, 0)
    with pytest.raises(ConfigError, match=r"data\.sources\.b\.weight"):
        Order({"a": 1, "b": 1}, {"a": 1, "b": 1e-6}, 0)
