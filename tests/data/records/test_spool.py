import json
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import DataError
from cantata.data.conversations import Conversations
from cantata.data.formats import Format
from cantata.data.records import RecordKind, spool
from cantata.data.records.spool import CHUNK, Spool
from cantata.data.split import Split
from tests.data.helpers import keys, letters_loader, source
from tests.data.media.clips import PDF, VIDEO

datasets = pytest.importorskip("datasets", reason="datasets is not installed")

ROWS = 3 * CHUNK + 5


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files, the first of which ends within a chunk."""
    names = []
    for number, (start, end) in enumerate([(0, CHUNK + 7), (CHUNK + 7, ROWS)]):
        names.append(str(tmp_path / f"{number}.jsonl"))
        Path(names[-1]).write_text("".join(json.dumps({"text": f"ä{n}"}) + "\n" for n in range(start, end)))
    return names


def opened(files: list[str], folder: Path, rows: int = ROWS) -> Spool:
    return Spool("json", None, files, "train", rows, str(folder))


def text(records: Spool, index: int) -> Any:
    return records[index]["text"]


def test_rows_in_the_order_of_the_stream(files: list[str], tmp_path: Path) -> None:
    records = opened(files, tmp_path / "spool")
    assert (len(records), records.root) == (ROWS, None)
    assert text(records, 3) == "ä3"
    assert len(list((tmp_path / "spool").rglob("rows-*.arrow"))) == 1
    for index in (ROWS - 1, 0, 2 * CHUNK, CHUNK - 1, CHUNK):
        assert text(records, index) == f"ä{index}"
    assert text(pickle.loads(pickle.dumps(records)), 5) == "ä5"


def test_it_goes_on_where_another_ended(files: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    first = opened(files, tmp_path / "spool", rows=CHUNK + 1)
    assert text(first, CHUNK) == f"ä{CHUNK}"
    second = opened(files, tmp_path / "spool")
    assert text(second, 2 * CHUNK) == f"ä{2 * CHUNK}"
    # The first stream stands two chunks back and must not write from there.
    assert first._pull()
    assert [text(second, index) for index in range(ROWS)] == [f"ä{index}" for index in range(ROWS)]
    monkeypatch.setattr(
        spool, "call_load_dataset", lambda *_, **__: pytest.fail("a full spool needs no source")
    )
    assert text(opened(files, tmp_path / "spool"), ROWS - 1) == f"ä{ROWS - 1}"


def test_a_run_begins_with_the_front_of_the_stream(files: list[str], tmp_path: Path) -> None:
    records = opened(files, tmp_path / "spool")
    dataset = Conversations(records, RecordKind.auto, Format.auto, None, None, Split.all, 0.0, VIDEO, PDF)
    batch = next(iter(letters_loader({"s": source(dataset)})))
    assert keys(batch)[:2] == ["s:0", "s:4"]
    assert len(list((tmp_path / "spool").rglob("rows-*.arrow"))) == 1


@pytest.mark.slow
def test_several_processes_share_a_spool(files: list[str], tmp_path: Path) -> None:
    records = opened(files, tmp_path / "spool")
    order = [(index * 331) % ROWS for index in range(ROWS)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(records.__getitem__, order, chunksize=50)
    assert [row["text"] for row in found] == [f"ä{index}" for index in order]


def test_a_killed_writer_leaves_nothing_half(files: list[str], tmp_path: Path) -> None:
    records = opened(files, tmp_path / "spool")
    text(records, 0)
    [folder] = (tmp_path / "spool").iterdir()
    (folder / "rows-00000001.incomplete").write_bytes(b"half")
    before = (folder / spool.STATE).read_text()
    text(records, CHUNK)
    # Killed between the rows and the state: the same rows are written again.
    (folder / spool.STATE).write_text(before)
    again = opened(files, tmp_path / "spool")
    assert [text(again, index) for index in (CHUNK, ROWS - 1)] == [f"ä{CHUNK}", f"ä{ROWS - 1}"]


@pytest.mark.parametrize("ends_with_a_chunk", [False, True])
def test_a_stream_that_ends_early(tmp_path: Path, ends_with_a_chunk: bool) -> None:
    there = CHUNK if ends_with_a_chunk else CHUNK + 3
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(there)))
    records = opened([str(file)], tmp_path / "spool")
    assert text(records, there - 1) == str(there - 1)
    for index in (there, 3 * CHUNK):
        with pytest.raises(DataError, match=rf"stream ended \(row {index} of {ROWS}"):
            records[index]


def test_what_cannot_be_streamed(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="datasets cannot load json"):
        opened([str(tmp_path / "gone.jsonl")], tmp_path / "spool")
    with pytest.raises(ConfigError, match="rows=0"):
        opened(files, tmp_path / "spool", rows=0)
    with pytest.raises(ConfigError, match="the spool cannot be kept"):
        opened(files, Path(files[0]))
    records = opened(files, tmp_path / "spool")
    shutil.copy(files[0], tmp_path / "copy")
    Path(files[0]).unlink()
    with pytest.raises(RunError, match="the stream of json failed"):
        records[0]
