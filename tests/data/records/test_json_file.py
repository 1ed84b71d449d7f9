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
from tests.data.records.test_lines import RECORDS, write


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.sampled_from([None, 2]), st.booleans())
def test_round_trip(tmp_path: Path, records: list[dict[str, Any]], indent: int | None, wrapped: bool) -> None:
    value = {"version": {"a": [1]}, "data": records, "n": 3} if wrapped else records
    path = write(tmp_path / "a.json", json.dumps(value, indent=indent))
    read = pickle.loads(pickle.dumps(JsonFile(path)))
    assert [read[index] for index in range(len(read))] == records


def test_offsets_are_bytes(tmp_path: Path) -> None:
    read = JsonFile(write(tmp_path / "a.json", '\ufeff [ {"a": "ä漢😀"} ,\n3, {"b": "é"} ]\n'))
    assert (read[0], read[2]) == ({"a": "ä漢😀"}, {"b": "é"})
    with pytest.raises(DataError, match=r"bad json \(element 1: int"):
        read[1]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "3",
            "[1,",
            "[1,]",
            "[1 2]",
            "[1] x",
            "{}",
            '{"a": 1}',
            '{"a": [], "b": []}',
            '{"a" []}',
            "{3: []}",
        ),
        *('{"a": [],}', "[" * 100_000, '[{"a": 1}', "\xff"),
    ],
)
def test_no_readable_array(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="holds no readable JSON array") as caught:
        JsonFile(write(tmp_path / "a.json", text.encode("latin-1")))
    assert "\n" not in str(caught.value)
