"""Damaged files only ever give a `DataError`; `fuzz.py` does the damage."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def fuzz(kind: str, count: int, seconds: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.data.media.fuzz", kind, "1", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "opened" in done.stdout
    assert "corrupt" in done.stdout


@pytest.mark.parametrize("kind", ["images", "videos", "documents"])
def test_damaged_files(kind: str) -> None:
    fuzz(kind, 120, 120)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "videos", "documents"])
def test_many_damaged_files(kind: str) -> None:
    fuzz(kind, 3000, 600)
