from pathlib import Path

import pytest

from cantata.core.samples import DataError
from cantata.data.records.base import Chain, json_object, json_value, utf8
from cantata.data.records.lines import JsonLines


def test_json_or_a_reason() -> None:
    assert json_object(b'\xef\xbb\xbf{"a": 1}', "line 1") == {"a": 1}
    assert json_value(b"[1]", "x") == [1]
    for raw in (b"{", b"", b"\0\0", b"3", b"[" * 100_000, b"1" * 10_000):
        with pytest.raises(DataError, match=r"bad json \(line 7: ") as caught:
            json_object(raw, "line 7")
        assert len(str(caught.value)) < 200
    with pytest.raises(DataError, match=r"not UTF-8 \(line 7: "):
        utf8(b"\xff", "line 7")


def test_a_chain_is_one_after_the_other(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 0), ("c", 3)):
        lines = [f'{{"name": "{name}{number}"}}\n' for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    chain = Chain([JsonLines(str(tmp_path / f"{name}.jsonl")) for name in "abc"], tmp_path)
    assert [chain[index]["name"] for index in range(len(chain))] == ["a0", "a1", "c0", "c1", "c2"]
