"""What a run runs on."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from cantata.train.environment import commit, environment, versions


def test_it_is_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    told = environment()
    assert json.loads(json.dumps(told)) == told
    assert told["ranks"] == 1
    assert list(told["devices"].values()) == [1]
    assert told["variables"]["NCCL_DEBUG"] == "INFO"
    assert "hidden" not in json.dumps(told)


def test_versions_are_those_in_use() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__


def test_the_commit_tells_changed_files(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    assert commit(tmp_path / "nowhere") is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = commit(tmp_path)
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == clean + "+"
