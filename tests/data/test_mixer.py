import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError, Document
from cantata.data.formats import Format
from cantata.data.mixer import Mixer, Portion
from cantata.data.records import RecordKind
from cantata.data.split import Split
from tests.data.helpers import keys, letters_loader, source
from tests.data.test_conversations import PDF, VIDEO, jsonl


class Numbers:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        assert 0 <= index < self.size
        return index


def drawn(size: int, weight: float, seed: int = 1, name: str = "a") -> list[int]:
    portion = Portion(Numbers(size), weight, seed, name)
    return [portion[index] for index in range(len(portion))]


def mixer(datasets: dict[str, float], **changes: Any) -> Mixer:
    settings: dict[str, Any] = {
        "seed": 7,
        "records": RecordKind.auto,
        "format": Format.auto,
        "template": None,
        "root": None,
        "split": Split.train,
        "held_out_share": 0.0,
        "video": VIDEO,
        "pdf": PDF,
    }
    return Mixer(datasets, **(settings | changes))


def texts(path: Path, name: str, count: int, file: str = "train.jsonl") -> str:
    jsonl(path / name / file, *({"text": f"{name}{number}"} for number in range(count)))
    return str(path / name)


@given(st.integers(1, 200), st.floats(0.01, 4), st.integers(0, 5))
def test_a_weight_is_samples_of_an_epoch(size: int, weight: float, seed: int) -> None:
    counts = Counter(drawn(size, weight, seed))
    assert counts.total() == max(1, round(weight * size))
    whole = counts.total() // size
    assert set(counts.values()) <= {whole, whole + 1}


def test_below_one_at_random_and_not_the_first() -> None:
    half = set(drawn(1000, 0.5))
    assert len(half) == 500
    # The number of a random half that lies in the first half: 250 with a standard deviation of 8.
    assert 200 < len([index for index in half if index < 500]) < 300
    assert half == set(drawn(1000, 0.5))
    assert half != set(drawn(1000, 0.5, seed=2))
    assert half != set(drawn(1000, 0.5, name="b"))
    assert set(drawn(1000, 0.25)) < half


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight of a is .* must be above 0"):
        Portion(Numbers(3), weight, 0, "a")
    assert len(Portion(Numbers(0), 2, 0, "a")) == 0


def test_a_mix_of_folders(tmp_path: Path) -> None:
    paths = {texts(tmp_path, "a", 10): 2.0, texts(tmp_path, "b", 10): 0.3, texts(tmp_path, "c", 4): 1.0}
    mixed = pickle.loads(pickle.dumps(mixer(paths)))
    assert len(mixed) == 20 + 3 + 4
    found = Counter(mixed[index].parts[0] for index in range(len(mixed)))
    assert {found[f"a{number}"] for number in range(10)} == {2}
    assert sum(found[f"b{number}"] for number in range(10)) == 3
    assert {found[f"c{number}"] for number in range(4)} == {1}
    assert [len(part) for part in mixed.parts.values()] == [20, 3, 4]


def test_held_out_samples_come_once(tmp_path: Path) -> None:
    paths = {texts(tmp_path, "a", 10): 2.0, texts(tmp_path, "b", 10): 0.1}
    assert len(mixer(paths, split=Split.held_out)) == 0
    texts(tmp_path, "a", 3, "test.jsonl")
    texts(tmp_path, "b", 4, "test.jsonl")
    held_out = mixer(paths, split=Split.held_out)
    assert [held_out[index] for index in range(7)] == [
        Document((f"{name}{number}",)) for name, count in (("a", 3), ("b", 4)) for number in range(count)
    ]


def test_messages_name_the_path(tmp_path: Path) -> None:
    good, bad = texts(tmp_path, "a", 2), texts(tmp_path, "b", 2)
    with (Path(bad) / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    mixed = mixer({good: 1, bad: 1})
    errors = []
    for index in range(len(mixed)):
        try:
            mixed[index]
        except DataError as error:
            errors.append(error)
    [error] = errors
    assert error.reason == "bad json"
    assert error.detail.startswith(f"{bad}: line 3: ")
    with pytest.raises(ConfigError, match="name at least one path"):
        mixer({})
    with pytest.raises(ConfigError, match="gone"):
        mixer({str(tmp_path / "gone"): 1})
    with pytest.raises(ConfigError, match=f"weight of {good} is 0"):
        mixer({good: 0})


def test_an_epoch_of_the_loader_is_the_mix(tmp_path: Path) -> None:
    paths = {texts(tmp_path, "a", 9): 2.0, texts(tmp_path, "b", 10): 0.5}
    loader = letters_loader({"mixer": source(mixer(paths))}, streams=1, window=1, sequence_length=4)
    seen: list[str] = []
    for batch in loader:
        seen += keys(batch)
        if len(seen) >= 23:
            break
    assert sorted(seen[:23]) == sorted(f"mixer:{index}" for index in range(23))
