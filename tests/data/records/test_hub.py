import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records import RecordKind, open_records
from cantata.data.records.hub import DatasetRows, load_hub
from tests.data.records.test_lines import write

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def pictures() -> Any:
    features = datasets.Features(
        {"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))}
    )
    rows = {"image": [{"bytes": b"no image", "path": None}] * 3, "texts": [["a"], [], ["b", "c"]]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_in_memory_nothing_is_decoded() -> None:
    records = pickle.loads(pickle.dumps(DatasetRows(pictures(), None)))
    assert (len(records), records.root) == (3, None)
    assert records[2] == {"image": {"bytes": b"no image", "path": None}, "texts": ["b", "c"]}
    assert DatasetRows(pictures().select([2, 0]), None)[0]["texts"] == ["b", "c"]


def test_saved_to_disk(tmp_path: Path) -> None:
    pictures().save_to_disk(str(tmp_path / "one"))
    records = pickle.loads(pickle.dumps(open_records(str(tmp_path / "one"), RecordKind.auto)))
    assert (len(records), records.root) == (3, tmp_path / "one")
    assert records[0]["image"]["bytes"] == b"no image"
    datasets.DatasetDict({"train": pictures(), "test": pictures()}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="holds the splits test, train; name one"):
        open_records(str(tmp_path / "two"), RecordKind.auto)
    assert len(open_records(str(tmp_path / "two" / "train"), RecordKind.auto)) == 3


def test_damaged_on_disk(tmp_path: Path) -> None:
    pictures().save_to_disk(str(tmp_path / "one"))
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match="no readable saved dataset") as caught:
        open_records(str(tmp_path / "one"), RecordKind.auto)
    assert "\n" not in str(caught.value)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match="no readable saved dataset"):
        open_records(str(tmp_path / "one"), RecordKind.auto)


def test_local_files_by_a_builder(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": str(n)}) + "\n" for n in range(5)))
    assert load_hub("json", None, [path], "train[1:3]")[0] == {"text": "1"}
    with pytest.raises(ConfigError, match="datasets cannot load json") as caught:
        load_hub("json", None, [path], "test")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="datasets cannot load nobody/nothing"):
        load_hub("nobody/nothing", None, None, "train")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'cantata\[datasets\]'"):
        load_hub("json", None, None, "train")


def test_an_unreadable_row() -> None:
    class Broken:
        def with_format(self, _: str) -> "Broken":
            return self

        def __getitem__(self, _: int) -> Any:
            raise OSError("cut off")

    with pytest.raises(DataError, match=r"unreadable row \(row 3: cut off"):
        DatasetRows(Broken(), None)[3]
