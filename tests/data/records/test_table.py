import pickle
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records.table import ParquetRows


def table(path: Path, rows: int = 8, group: int = 3) -> str:
    columns = {
        "image": [{"bytes": bytes([number]) * 500, "path": None} for number in range(rows)],
        "messages": [[{"role": "user", "content": str(number)}] for number in range(rows)],
    }
    parquet.write_table(arrow.table(columns), path, row_group_size=group, compression="none")
    return str(path)


def test_rows_over_row_groups(tmp_path: Path) -> None:
    records = pickle.loads(pickle.dumps(ParquetRows(table(tmp_path / "a.parquet"))))
    assert (len(records), records.root) == (8, tmp_path)
    for number in (7, 0, 3, 2, 6):
        assert records[number] == {
            "image": {"bytes": bytes([number]) * 500, "path": None},
            "messages": [{"role": "user", "content": str(number)}],
        }


def test_damaged_files(tmp_path: Path) -> None:
    path = Path(table(tmp_path / "a.parquet"))
    whole = path.read_bytes()
    for data in (b"", b"hello", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="no readable parquet"):
            ParquetRows(str(path))
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    records = ParquetRows(str(path))
    outcomes = []
    for index in range(len(records)):
        try:
            outcomes.append(str(records[index]["messages"]))
        except DataError as error:
            outcomes.append(error.reason)
    assert "unreadable row" in outcomes


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = arrow.Array.from_buffers(
        arrow.string(), 2, [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), arrow.py_buffer(b"a\xff")]
    )
    parquet.write_table(arrow.table({"text": text}), tmp_path / "a.parquet")
    records = ParquetRows(str(tmp_path / "a.parquet"))
    assert records[0] == {"text": "a"}
    with pytest.raises(DataError, match=r"unreadable row \(row 1: "):
        records[1]
