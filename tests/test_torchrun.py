"""The launcher that knows exit codes: what is started again, what is passed on, and what it ends with."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.recipes.runner import start_process

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WORKER = textwrap.dedent(
    """
    import os, pathlib, signal, sys, time

    folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
    codes = [int(code) for code in sys.argv[2].split(",")]
    with (folder / f"starts.{rank}").open("a") as starts:
        starts.write("x")
    got = []
    time.sleep(float(os.environ.get("IMPORTS", "0")))
    if sys.argv[3:] == ["waits"]:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: got.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
        (folder / f"ready.{rank}").touch()
        while not got:
            time.sleep(0.05)
        (folder / f"got.{rank}").write_text(signal.Signals(got[0]).name)
    (folder / f"ready.{rank}").touch()
    if sys.argv[3:] == ["sleeps"]:
        time.sleep(600)
    sys.exit(codes[int(os.environ["TORCHELASTIC_RESTART_COUNT"])] if rank == "0" else 0)
    """
)


def launch(folder: Path, codes: str, *how: str, imports: float = 0.0) -> subprocess.Popen[str]:
    """Two workers, of which the first ends with these codes, one after the other."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    return start_process(
        [
            *(sys.executable, "-m", "cantata.torchrun", "--standalone", "--nproc-per-node=2"),
            *("--max-restarts=2", "--monitor-interval=0.1", str(script), str(folder), codes, *how),
        ],
        IMPORTS=str(imports),
    )


def wait_for(run: subprocess.Popen[str], *files: Path) -> None:
    end = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("codes", "starts", "code"), [("75", 1, 75), ("1,2", 2, 2), ("1,1,0", 3, 0), ("1,1,1", 3, 1)]
)
def test_what_is_started_again(tmp_path: Path, codes: str, starts: int, code: int) -> None:
    run = launch(tmp_path, codes)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == code, text
    assert (tmp_path / "starts.0").read_text() == "x" * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_passed_on_and_the_workers_code_is_returned(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = launch(tmp_path, "75", "waits")
    wait_for(run, tmp_path / "ready.0", tmp_path / "ready.1")
    run.send_signal(number)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 75, text
    assert {(tmp_path / f"got.{rank}").read_text() for rank in (0, 1)} == {number.name}
    assert (tmp_path / "starts.0").read_text() == "x"


def test_a_signal_to_workers_that_still_start_is_neither_deadly_nor_lost(tmp_path: Path) -> None:
    run = launch(tmp_path, "75", "waits", imports=2.0)
    wait_for(run, tmp_path / "starts.0", tmp_path / "starts.1")
    run.send_signal(signal.SIGUSR1)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 75, text


def test_workers_that_sigterm_kills_are_not_started_again(tmp_path: Path) -> None:
    run = launch(tmp_path, "0", "sleeps")
    wait_for(run, tmp_path / "ready.0", tmp_path / "ready.1")
    run.terminate()
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, text
    assert (tmp_path / "starts.0").read_text() == "x"
