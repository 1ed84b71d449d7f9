"""What is asked first."""

from __future__ import annotations

import json
from pathlib import Path

from cantata.tools.report.run import read_runs
from cantata.tools.report.summary import Fact, facts
from tests.tools.report.runs import make_run, record, write_lines


def told(path: Path) -> dict[str, Fact]:
    [run] = read_runs([path])
    return {fact.name: fact for fact in facts(run)}


def test_a_finished_run(tmp_path: Path) -> None:
    found = told(make_run(tmp_path / "run"))
    assert found["state"].value == "finished"
    assert found["steps"] == Fact("steps", "12", "of 12")
    assert found["tokens"] == Fact("tokens", "1.20k", "480 learned")
    assert found["loss"] == Fact("loss", "0.66667", "lowest 0.66667 at 12")
    assert found["held-out loss"] == Fact("held-out loss", "2.5", "first 9, best 2.5 at 12")
    assert found["speed"].value == "203"
    assert found["memory"].value == "1.25 GiB"
    assert found["accuracy"] == Fact("accuracy", "0.5", "best 0.5 at 12")
    assert "mfu" not in found


def test_time_is_that_of_all_starts(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    history = path / "logs" / "history.jsonl"
    start, end = map(json.loads, history.read_text().splitlines())
    write_lines(history, [start, end | {"seconds": 90.0}, start, end | {"seconds": 30.0}])
    assert told(path)["time"] == Fact("time", "2:00", "in 2 starts")
    write_lines(history, [start, start, end | {"seconds": 30.0}])
    assert told(path)["time"] == Fact("time", "30s", "in 2 starts, without what was killed")
    history.unlink()
    assert told(path)["time"] == Fact("time", "6s", "in steps alone")


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "metrics.jsonl").write_text("")
    found = told(path)
    assert {name for name, fact in found.items() if fact.value == "-"} == {
        *("tokens", "loss", "held-out loss", "speed", "memory")
    }
    write_lines(path / "metrics.jsonl", [record(1, 3.0)])
    assert told(path)["loss"] == Fact("loss", "3", "lowest 3 at 1")
