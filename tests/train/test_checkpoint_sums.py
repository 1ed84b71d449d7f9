"""Sums of files by hand, and of what DCP writes. Whole runs are in tests/drills."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from cantata.train.checkpoint_sums import SUMS, FileSum, SummingWriter, as_json, damage, is_summed

FILES = {".metadata": b"index", "state.json": b"{}", "__0_0.distcp": bytes(10_000), "__1_0.distcp": b"one"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / SUMS).write_text(as_json({name: FileSum.of(content) for name, content in FILES.items()}))
    return tmp_path


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_what_is_as_written_is_sound(checkpoint: Path) -> None:
    assert is_summed(checkpoint)
    assert damage(checkpoint) == ""


@pytest.mark.parametrize("name", FILES)
def test_one_wrong_bit_anywhere_is_seen_by_the_one_part_that_reads_the_file(
    checkpoint: Path, name: str
) -> None:
    flip(checkpoint / name, byte=len(FILES[name]) // 2, bit=5)
    assert damage(checkpoint) == f"{name} does not match its checksum"
    assert sorted(damage(checkpoint, part, 3) for part in range(3)) == ["", "", damage(checkpoint)]


def test_short_and_absent_files_are_told_apart(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").write_bytes(b"on")
    assert damage(checkpoint) == "__1_0.distcp holds 2 bytes, 3 were written"
    (checkpoint / "__1_0.distcp").unlink()
    assert damage(checkpoint) == "__1_0.distcp cannot be read: No such file or directory"
    (checkpoint / ".metadata").unlink()
    assert damage(checkpoint) == ".metadata is not there"


def test_damaged_sums_are_damage_too(checkpoint: Path) -> None:
    unseen = []
    for byte in range(0, (checkpoint / SUMS).stat().st_size, 3):
        flip(checkpoint / SUMS, byte, bit=1)
        unseen += [] if damage(checkpoint) else [byte]
        flip(checkpoint / SUMS, byte, bit=1)
    assert unseen == []


def test_a_checkpoint_of_a_version_without_sums_cannot_be_compared(checkpoint: Path) -> None:
    (checkpoint / SUMS).unlink()
    flip(checkpoint / "__0_0.distcp", 0)
    assert not is_summed(checkpoint)
    assert damage(checkpoint) == ""


def test_the_writer_knows_what_it_wrote(tmp_path: Path) -> None:
    writer = SummingWriter(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({"a": torch.arange(1000.0), "b": torch.ones(3)}, storage_writer=writer, no_dist=True)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {".metadata", "__0_0.distcp"} == set(files)
    assert writer.sums == {name: FileSum(len(text), zlib.crc32(text)) for name, text in files.items()}
