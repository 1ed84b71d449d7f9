import contextlib
import io
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.records.tar import TarShard

MEMBERS = {
    "a/001.jpg": b"\xff\xd8",
    "a/001.txt": "ä".encode(),
    "a/001.JSON": b'{"n": 1}',
    "b/001.jpg": b"other",
    "002.seg.png": b"png",
    "002.cls": b"7",
    "002.mp4": b"",
    ".hidden.jpg": b"x",
    "README": b"x",
}


def shard(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_members_by_stem_and_ending(tmp_path: Path) -> None:
    records = pickle.loads(pickle.dumps(TarShard(shard(tmp_path / "a.tar", MEMBERS))))
    assert [records[index] for index in (2, 0, 1)] == [
        {"__key__": "002", "seg.png": b"png", "cls": "7", "mp4": b""},
        {"__key__": "a/001", "jpg": b"\xff\xd8", "txt": "ä", "json": {"n": 1}},
        {"__key__": "b/001", "jpg": b"other"},
    ]
    assert len(records) == 3


def test_bad_members(tmp_path: Path) -> None:
    records = TarShard(shard(tmp_path / "a.tar", {"1.json": b"{", "2.txt": b"\xff", "3.json": b"[1]"}))
    with pytest.raises(DataError, match=r"bad json \(1\.json: "):
        records[0]
    with pytest.raises(DataError, match=r"not UTF-8 \(2\.txt: "):
        records[1]
    assert records[2]["json"] == [1]


def test_bad_tars(tmp_path: Path) -> None:
    path = Path(shard(tmp_path / "a.tar", {f"{number}.txt": b"x" * 600 for number in range(20)}))
    whole = path.read_bytes()
    cut = len(whole) // 2
    # The end of a header, of a member, of everything; a header overwritten; nothing; no tar.
    broken = whole[:cut] + b"garbage!" * 256 + whole[cut + 2048 :]
    for data in (whole[:700], whole[: 512 + 1024 + 512 + 100], broken, b"", b"hello", b"\1" * 5000):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"no readable uncompressed tar|is damaged at byte") as caught:
            TarShard(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="decompress it"):
        TarShard(shard(tmp_path / "a.tar.gz", MEMBERS, "w:gz"))
    with pytest.raises(ConfigError, match=r"holds 1\.txt twice"):
        TarShard(shard(tmp_path / "b.tar", [("1.txt", b"a"), ("1.txt", b"b")]))


def test_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = Path(shard(tmp_path / "a.tar", {"1.txt": b"x" * 600, "2.txt": b"y" * 600}))
    records = TarShard(str(path))
    path.write_bytes(path.read_bytes()[:2500])
    assert records[0]["txt"] == "x" * 600
    with pytest.raises(DataError, match="truncated file"):
        records[1]


def test_each_process_opens_its_own_file(tmp_path: Path) -> None:
    contents = {f"{number}.txt": str(number).encode() for number in range(40)}
    records = TarShard(shard(tmp_path / "a.tar", contents))
    assert records[3]["txt"] == "3"
    handle = records._file._file.get(lambda: pytest.fail("it is open")).fileno()
    before = os.lseek(handle, 0, os.SEEK_CUR)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(records.__getitem__, range(40)) == [records[index] for index in range(40)]
        records[3]
        pool.map(records.__getitem__, [39])
    # A handle that a child shares would have been moved by what the child read.
    assert os.lseek(handle, 0, os.SEEK_CUR) == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12_000), st.binary(min_size=1, max_size=30))
def test_any_damage_is_records_or_reasons(tmp_path: Path, place: int, data: bytes) -> None:
    path = Path(shard(tmp_path / "a.tar", {f"{number}.txt": b"x" * 600 for number in range(8)}))
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])
    with contextlib.suppress(ConfigError, DataError):
        records = TarShard(str(path))
        for index in range(len(records)):
            records[index]
