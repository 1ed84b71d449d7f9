from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.records import RecordKind, open_records
from cantata.data.records.folder import Folder
from cantata.data.records.json_file import JsonFile
from cantata.data.records.lines import JsonLines
from cantata.data.records.table import ParquetRows
from cantata.data.records.tar import TarShard
from tests.data.records.test_table import table
from tests.data.records.test_tar import MEMBERS, shard


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def auto(path: str) -> Any:
    return open_records(path, RecordKind.auto)


def test_by_name_and_by_content(tmp_path: Path) -> None:
    assert isinstance(auto(write(tmp_path / "a.jsonl", "[]")), JsonLines)
    assert isinstance(auto(write(tmp_path / "a.json", ' [{"a": 1}]')), JsonFile)
    assert isinstance(auto(write(tmp_path / "b.json", '{"data": [\n{"a": 1}\n]}')), JsonFile)
    lines = auto(write(tmp_path / "c.json", '{"a": 1}\n\n{"a": 2}\n'))
    assert isinstance(lines, JsonLines)
    assert len(lines) == 2
    assert isinstance(auto(table(tmp_path / "a.parquet")), ParquetRows)
    assert isinstance(auto(table(tmp_path / "no-ending")), ParquetRows)
    assert isinstance(auto(shard(tmp_path / "b.data", MEMBERS)), TarShard)
    assert isinstance(open_records(write(tmp_path / "d", "{}"), RecordKind.jsonl), JsonLines)


def test_a_glob_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for number in (2, 0, 1):
        write(tmp_path / "x" / f"part-{number}.jsonl", f'{{"n": {number}}}\n')
    records = auto(str(tmp_path / "x" / "part-*.jsonl"))
    assert [records[index]["n"] for index in range(3)] == [0, 1, 2]
    assert records.root == tmp_path / "x"
    assert auto(str(tmp_path / "*" / "part-*.jsonl")).root == tmp_path
    with pytest.raises(ConfigError, match="no file matches"):
        auto(str(tmp_path / "*.tar"))
    odd = write(tmp_path / "a[1].jsonl", "{}")
    assert len(auto(odd)) == 1


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "media" / "inner").mkdir(parents=True)
    (tmp_path / "media" / "inner" / "a.png").write_bytes(b"x")
    assert isinstance(auto(str(tmp_path / "media")), Folder)
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "0.tar", MEMBERS)
    with pytest.raises(ConfigError, match=r"holds 0\.tar; name a file, or several by a glob"):
        auto(str(tmp_path / "shards"))


def test_neither_name_nor_content(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither its name nor its content.*jsonl, json, parquet, tar"):
        auto(write(tmp_path / "a.txt", "hello"))
    with pytest.raises(ConfigError, match="neither its name"):
        auto(write(tmp_path / "empty", ""))
    with pytest.raises(ConfigError, match="no such file"):
        auto(str(tmp_path / "gone.jsonl"))
