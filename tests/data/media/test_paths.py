import os
from pathlib import Path

import pytest

from cantata.core.samples import DataError
from cantata.data.media.paths import resolve_inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/one.jpg").write_bytes(b"1")
    (tmp_path / "secret.jpg").write_bytes(b"2")
    (tmp_path / "set2").mkdir()
    (tmp_path / "set2/near.jpg").write_bytes(b"3")
    (folder / "link.jpg").symlink_to(folder / "deep/one.jpg")
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe.jpg")
    return folder.resolve()


@pytest.mark.parametrize("reference", ["deep/one.jpg", "./deep/../deep/one.jpg", "link.jpg"])
def test_inside(root: Path, reference: str) -> None:
    assert resolve_inside(root, reference) == root / "deep/one.jpg"
    assert resolve_inside(root, str(root / reference)) == root / "deep/one.jpg"


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("../secret.jpg", "path outside the root"),
        ("../set2/near.jpg", "path outside the root"),
        ("deep/../../secret.jpg", "path outside the root"),
        ("/etc/passwd", "path outside the root"),
        ("out.jpg", "path outside the root"),
        ("outside/secret.jpg", "path outside the root"),
        ("../absent.jpg", "path outside the root"),
        ("absent.jpg", "missing file"),
        ("loop", "missing file"),
        ("nul\0l.jpg", "missing file"),
        ("half \ud800.jpg", "missing file"),
        ("x" * 5000, "missing file"),
        ("deep", "not a regular file"),
        (".", "not a regular file"),
        ("pipe.jpg", "not a regular file"),
        ("https://example.org/cat.jpg", "remote file"),
        ("s3://bucket/cat.jpg", "remote file"),
        ("file:///etc/passwd", "remote file"),
    ],
)
def test_elsewhere(root: Path, reference: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve_inside(root, reference)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


def test_remote_files_say_what_to_do(root: Path) -> None:
    with pytest.raises(DataError, match="download them"):
        resolve_inside(root, "http://example.org/cat.jpg")
