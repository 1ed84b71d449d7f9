import pickle
from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records.folder import Folder


def files(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


def all_of(path: str) -> list[dict[str, object]]:
    records = pickle.loads(pickle.dumps(Folder(path)))
    return [records[index] for index in range(len(records))]


def test_files_with_what_stands_beside_them(tmp_path: Path) -> None:
    path = files(
        tmp_path, "b.JPG", "a/c.png", "a/c.txt", "d.mp4", "e.pdf", "notes.md", ".hidden.png", "f.txt"
    )
    (tmp_path / "d.json").write_text('{"messages": [], "text": "inner"}')
    assert all_of(path) == [
        {"image": "a/c.png", "text": "x"},
        {"image": "b.JPG"},
        {"messages": [], "text": "inner", "video": "d.mp4"},
        {"pdf": "e.pdf"},
    ]
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(DataError, match=r"bad json \(d\.json: "):
        Folder(path)[2]


def test_metadata_lines(tmp_path: Path) -> None:
    path = files(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "two"}\n{"file_name": "c.mp4"}\n{"file_name": 3}\n{broken\n'
        '{"left_file_name": "a.png", "right_file_names": ["b.png"]}\n'
    )
    records = Folder(path)
    assert len(records) == 5
    assert records[0] == {"image": "b.png", "text": "two"}
    assert records[1] == {"video": "c.mp4"}
    assert records[4] == {"left": "a.png", "right": ["b.png"]}
    with pytest.raises(DataError, match="no media file"):
        records[2]
    with pytest.raises(DataError, match=r"bad json \(line 4"):
        records[3]


def test_metadata_csv(tmp_path: Path) -> None:
    path = files(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,text\na.png,"two\nlines, ä"\nb.png\n', encoding="utf-8"
    )
    assert all_of(path) == [{"image": "a.png", "text": "two\nlines, ä"}, {"image": "b.png", "text": ""}]
    for bad in (b'file_name,text\n"a.png,x', b"file_name\n\xff"):
        (tmp_path / "metadata.csv").write_bytes(bad)
        with pytest.raises(ConfigError, match="no readable CSV"):
            Folder(path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Folder(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="a file, where a folder"):
        Folder(files(tmp_path, "a.png") + "/a.png")
    assert all_of(files(tmp_path / "empty", "notes.md")) == []
