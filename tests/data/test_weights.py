import pytest

from cantata.core.errors import ConfigError
from cantata.data.reading import Reader
from cantata.data.weights import PROBE, mean_tokens, weights_of_tokens
from tests.data.helpers import Letters, Words, source


def reader(**datasets: Words) -> Reader:
    sources = {name: source(dataset, 3.0) for name, dataset in datasets.items()}
    return Reader(sources, Letters().encode, 32, "data.sources")


def test_a_small_source_is_counted_exactly_and_what_is_dropped_counts_as_nothing() -> None:
    assert mean_tokens(reader(a=Words("a", [4, 8, 50, 6], broken=[3])), "a") == 12 / 4


def test_weights_of_samples() -> None:
    found = weights_of_tokens(reader(a=Words("a", [4] * 9), b=Words("b", [12] * 30)))
    assert {name: one.weight for name, one in found.items()} == {"a": 3 / 4, "b": 3 / 12}


def test_a_large_source_is_estimated_from_a_probe_that_never_changes() -> None:
    lengths = [1 + 29 * (i > 20_000) for i in range(40_000)]
    read: list[int] = []

    class Watched(Words):
        def __getitem__(self, index: int):
            read.append(index)
            return super().__getitem__(index)

    of = reader(a=Watched("a", lengths))
    first = mean_tokens(of, "a")
    assert first == mean_tokens(of, "a") == pytest.approx(15.5, rel=0.25)
    assert len(read) == 2 * PROBE
    assert len(set(read)) == PROBE


def test_of_a_stream_the_first_samples_are_probed() -> None:
    class Streamed(Words):
        is_sequential = True

    assert mean_tokens(reader(a=Streamed("a", [3] * PROBE + [30] * PROBE)), "a") == 3


def test_nothing_to_go_by() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.a: none of 2 samples .*weight_unit=samples"):
        mean_tokens(reader(a=Words("a", [50, 4], broken=[1])), "a")
