"""How a run stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cantata.tools.report.state import State, read_history, state_of
from cantata.train.history import FILE

START = {"event": "start", "time": "2026-11-28T10:00:00+00:00", "step": 0, "host": "node7"}
END = {"event": "end", "time": "2026-11-28T10:01:00+00:00", "step": 9, "seconds": 60.0}


def history(run: Path, *events: dict[str, Any]) -> None:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / FILE).write_text("".join(json.dumps(event) + "\n" for event in events))


def state(run: Path, *events: dict[str, Any], last_step: int = 9) -> State:
    if events:
        history(run, *events)
    return state_of(run, read_history(run), last_step, max_steps=9)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"outcome": "done", "exit_code": 0}, State("finished", "")),
        ({"outcome": "done early (x)", "exit_code": 0}, State("finished", "done early (x)")),
        ({"outcome": "stopped", "exit_code": 75}, State("preempted", "stopped")),
        ({"outcome": "failed", "error": "step 3: nan", "exit_code": 1}, State("failed", "step 3: nan")),
    ],
)
def test_the_last_end_decides(tmp_path: Path, end: dict[str, Any], expected: State) -> None:
    before = END | {"outcome": "failed", "error": "old", "exit_code": 1}
    assert state(tmp_path, START, before, START, END | end) == expected


def test_a_start_without_an_end_was_killed(tmp_path: Path) -> None:
    found = state(tmp_path, START, END | {"outcome": "done", "exit_code": 0}, START)
    assert found.word == "failed"
    assert "it was killed" in found.detail
    assert "2026-11-28 10:00:00 UTC on node7" in found.detail


def test_one_that_holds_its_directory_is_running(tmp_path: Path) -> None:
    history(tmp_path, START)
    hold = (
        "import sys; from pathlib import Path; from cantata.train.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert state(tmp_path) == State("running", "since 2026-11-28 10:00:00 UTC")
        process.communicate()
    assert state(tmp_path).word == "failed"


def test_without_a_history_the_steps_decide(tmp_path: Path) -> None:
    assert state(tmp_path).word == "finished"
    assert state(tmp_path, last_step=8).word == "unknown"


def test_an_end_before_the_start_was_written_is_a_start_of_its_own(tmp_path: Path) -> None:
    done = END | {"outcome": "done", "exit_code": 0}
    failed = END | {"outcome": "failed", "error": "no checkpoint", "exit_code": 1}
    history(tmp_path, START, done, failed)
    starts = read_history(tmp_path)
    assert [start.end for start in starts] == [done, failed]
    assert state(tmp_path) == State("failed", "no checkpoint")


def test_broken_lines_are_passed_over_and_time_goes_on(tmp_path: Path) -> None:
    history(tmp_path, START, END)
    with (tmp_path / FILE).open("a") as file:
        file.write('[]\n7\n{"event": "pause"}\n' + json.dumps(START) + '\n{"event": "st')
    ended, going = read_history(tmp_path)
    assert (ended.seconds(None), going.seconds(None)) == (60.0, 0.0)
    assert going.seconds(datetime(2026, 11, 28, 10, 5, tzinfo=UTC)) == 300.0
