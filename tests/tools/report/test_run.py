"""Run directories, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.tools.report.run import read_runs
from tests.tools.report.runs import make_run, record, write_lines


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run"), make_run(tmp_path / "other")]
    assert [run.label for run in read_runs(paths)] == ["a/run", "b/run", f"{tmp_path.name}/other"]
    assert [run.label for run in read_runs(paths[:1])] == ["run"]


def test_resumes_are_known_from_the_history_or_the_lines(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    write_lines(path / "metrics.jsonl", [record(step, 1.0) for step in (1, 2, 3, 4, 3, 4, 5)])
    [run] = read_runs([path])
    assert run.resumes == [2]
    history = path / "logs" / "history.jsonl"
    history.write_text(history.read_text().replace('"step": 0', '"step": 4'))
    [run] = read_runs([path])
    assert run.resumes == [2, 4]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def refused(*paths: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            read_runs(paths)
        return str(caught.value)

    assert "none: no such directory; name run directories" in refused(tmp_path / "none")
    assert "holds no config.yaml" in refused(tmp_path)
    assert "is named twice" in refused(run, run / "." / ".." / "run")
    (run / "metrics.jsonl").unlink()
    assert refused(run) == f"{run} is no run directory: it holds no metrics.jsonl"
    (run / "config.yaml").write_text("- a list")
    (run / "metrics.jsonl").touch()
    assert "is no mapping of keys" in refused(run)
