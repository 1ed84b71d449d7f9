"""`cantata report` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.cli import main
from tests.tools.report.runs import make_run


def test_one_run_keeps_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path / "run")
    assert main(["report", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "run: finished, step 12"
    assert said[1].startswith(f"report: {path / 'report.html'} (")
    assert (path / "report.html").read_text().startswith("<!doctype html>")
    assert not list(path.glob("*.incomplete"))


def test_several_write_where_they_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *paths]) == 0
    assert main(["report", *paths, "--to", "deep/down/page.html"]) == 0
    assert "2 runs side by side" in (tmp_path / "report.html").read_text()
    assert "2 runs side by side" in (tmp_path / "deep" / "down" / "page.html").read_text()
    assert not (tmp_path / "one" / "report.html").exists()


def test_bad_use_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path / "run")
    for arguments, line in (
        ([], "error: cantata report: the following arguments are required: RUN"),
        ([str(tmp_path / "none")], f"error: {tmp_path / 'none'}: no such directory; name run directories"),
        ([str(tmp_path)], f"error: {tmp_path} is no run directory: it holds no config.yaml"),
        ([str(path), str(path)], f"error: {path} is named twice"),
        (
            [str(path), "--to", "/dev/null/page.html"],
            "error: /dev/null/page.html: the page cannot be written",
        ),
    ):
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(line)
        assert said.err.count("\n") == 1
