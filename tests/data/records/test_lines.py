import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records.json_file import JsonFile
from cantata.data.records.lines import JsonLines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=6)


def write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_lines_by_offset(tmp_path: Path) -> None:
    text = '\ufeff{"n": "ä"}\n\n  \n{broken\r\n{"n": 2}\r\n[3]\n{"n": 4}'
    records = JsonLines(write(tmp_path / "a.jsonl", text))
    assert (len(records), records.root) == (5, tmp_path)
    assert [records[index]["n"] for index in (4, 0, 2)] == [4, "ä", 2]
    with pytest.raises(DataError, match=r"bad json \(line 4: "):
        records[1]
    with pytest.raises(DataError, match=r"bad json \(line 6: list"):
        records[3]
    assert pickle.loads(pickle.dumps(records))[4] == {"n": 4}


def test_absent_empty_and_no_file(tmp_path: Path) -> None:
    assert len(JsonLines(write(tmp_path / "a.jsonl", ""))) == 0
    with pytest.raises(ConfigError, match="no such file"):
        JsonLines(str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match="folder"):
        JsonLines(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.booleans())
def test_lines_round_trip(tmp_path: Path, records: list[dict[str, Any]], plain: bool) -> None:
    text = "\n".join(json.dumps(record, ensure_ascii=plain) for record in records)
    try:
        path = write(tmp_path / "a.jsonl", text)
    except UnicodeEncodeError:
        return
    read = JsonLines(path)
    assert [read[index] for index in range(len(read))] == records


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_reasons(tmp_path: Path, data: bytes) -> None:
    records = JsonLines(write(tmp_path / "a.jsonl", data))
    for index in range(len(records)):
        with contextlib.suppress(DataError):
            assert isinstance(records[index], dict)
    with contextlib.suppress(ConfigError):
        JsonFile(str(tmp_path / "a.jsonl"))
