"""A disk that fills up, bits that turn, clocks that jump, and two runs in one directory."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.drills.runs import SETTINGS, assert_undisturbed, started
from tests.recipes.runner import metrics, pretrain
from tests.recipes.test_bad_input import refusal


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own where this process may mount one; else a plain folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def full(disk: Path, left: int) -> Iterator[str]:
    """Only `left` bytes more fit; where `disk` is no file system of its own, into any one file.

    Gives what the system says of the first byte that does not.
    """
    if not os.path.ismount(disk):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
        try:
            yield "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free - left))
    try:
        yield "No space left on device"
    finally:
        ballast.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_fills_up_in_a_save_leaves_the_last_checkpoint(
    disk: Path, whole: Path, capfd: pytest.CaptureFixture[str], background: str
) -> None:
    out = disk / "run"
    command = (*SETTINGS, f"checkpoint.background={background}")
    with started(out, f"checkpoint.background={background}") as run:
        run.block_save(6)
        run.wait_for_checkpoint(3)
        run.kill()
    kept = out / "checkpoints" / "step-00000003"
    shard = (kept / "__0_0.distcp").stat().st_size
    with full(disk, left=shard // 2) as reason:
        assert pretrain(out, *command) == 1
    message = refusal(capfd)
    assert f"checkpoint of step 6 could not be written to {out / 'checkpoints'}: __0_0.distcp" in message
    assert f"{reason} after " in message
    assert message.endswith(f"the last complete one is {kept}")
    assert list((out / "checkpoints").iterdir()) == [kept]
    assert (out / "LATEST").read_text() == "step-00000003\n"
    assert pretrain(out, *command) == 0
    assert_undisturbed(out, whole)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1 << 4
    path.write_bytes(content)


def test_a_flipped_bit_sends_the_run_to_the_checkpoint_before(
    tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(out, *SETTINGS) == 0
    newest = out / "checkpoints" / "step-00000008"
    flip_a_bit(newest / "__0_0.distcp")
    capfd.readouterr()
    assert pretrain(out, *SETTINGS) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert told == [
        f"warning: {newest} is damaged (__0_0.distcp does not match its checksum): it is kept as "
        "step-00000008.damaged, and the run goes on from step-00000006"
    ]
    assert_undisturbed(out, whole)


def test_without_a_sound_checkpoint_the_run_ends_and_touches_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(out, *SETTINGS, "train.max_steps=1") == 0
    flip_a_bit(out / "checkpoints" / "step-00000001" / ".metadata")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "logs" not in path.parts}
    assert pretrain(out, *SETTINGS) == 1
    assert "no sound checkpoint is left to go on from" in refusal(capfd)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "logs" not in path.parts}
    assert {path for path in before if after[path] != before[path]} <= {out / ".lock"}
    assert after.keys() == before.keys()


def test_clocks_that_jump_back_change_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock falls by an hour at every look, and the newest files get the oldest times."""
    out, looks = tmp_path / "run", iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(looks))
    monkeypatch.setattr(time, "time_ns", lambda: int(2e18) - 3600 * 10**9 * next(looks))
    assert pretrain(out, *SETTINGS, "train.early_stopping=null", "train.max_steps=7") == 0
    for age, path in enumerate(sorted((out / "checkpoints").iterdir(), reverse=True)):
        for one in (path, *path.iterdir()):
            os.utime(one, (1e9 + 1e6 * age, 1e9 + 1e6 * age))
    for path in (out / "LATEST", out / "metrics.jsonl"):
        os.utime(path, (0, 0))
    assert pretrain(out, *SETTINGS, "train.max_steps=8") == 0
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))
    assert all(0 < line["data_seconds"] <= line["step_seconds"] < 600 for line in metrics(out))


@pytest.mark.slow
def test_the_second_run_in_a_directory_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    with started(out, "train.max_steps=100000") as first:
        first.wait_for_step(1)
        before = len(metrics(out))
        assert pretrain(out, *SETTINGS) == 2
        assert f"{out} is in use by pid {first.processes[0].pid} on " in refusal(capfd)
        first.wait_for(lambda: len(metrics(out)) > before)
