"""Directories by name. Whole saves are tried in test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core.errors import ConfigError, RunError
from cantata.train.checkpoint_files import CheckpointFiles, is_complete, read_state


def write(files: CheckpointFiles, step: int) -> None:
    files.incomplete(step).mkdir(parents=True)
    (files.incomplete(step) / ".metadata").touch()


def test_only_published_ones_count_and_the_newest_is_the_largest_step(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    assert files.complete() == []
    for step in (9, 100_000_000, 10):
        write(files, step)
        files.publish(step, {"step": step}, {}, keep=5)
    write(files, 200_000_000)
    assert [path.name for path in files.complete()] == ["step-00000009", "step-00000010", "step-100000000"]
    assert files.newest() == tmp_path / "checkpoints" / "step-100000000"
    assert not is_complete(files.incomplete(200_000_000))


def test_keeping_removes_the_oldest(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    for step in (1, 2, 3):
        write(files, step)
        files.publish(step, {"step": step}, {}, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_the_best_one_is_named_and_never_thinned_out(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    assert files.best() is None
    for step in (1, 2, 3, 4, 5):
        write(files, step)
        files.publish(step, {"step": step}, {}, keep=2, best=step in (1, 3))
    names = [path.name for path in files.complete()]
    assert names == ["step-00000003", "step-00000004", "step-00000005"], "step 1 was the best until 3 came"
    assert (tmp_path / "BEST").read_text() == "step-00000003\n"
    assert (tmp_path / "LATEST").read_text() == "step-00000005\n"


def test_naming_the_best_again_needs_it_to_be_there(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    write(files, 1)
    files.publish(1, {"step": 1}, {}, keep=2)
    assert not files.name_best(2)
    assert files.best() is None
    assert files.name_best(1)
    assert files.best() == "step-00000001"


def test_publishing_twice_is_refused_and_leaves_the_first(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    for attempt in ("first", "second"):
        write(files, 1)
        if attempt == "first":
            files.publish(1, {"attempt": attempt}, {}, keep=2)
    with pytest.raises(RunError, match="never overwritten"):
        files.publish(1, {"attempt": "second"}, {}, keep=2)
    assert read_state(tmp_path / "checkpoints" / "step-00000001") == {"attempt": "first"}


def test_state_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        read_state(tmp_path / "nowhere")
    (tmp_path / ".metadata").touch()
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        read_state(tmp_path)
