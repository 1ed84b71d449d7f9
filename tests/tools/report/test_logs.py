"""Warnings and last words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core import logging as core_logging
from cantata.core.logging import get_logger, logging_to
from cantata.tools.report.logs import TAIL, TOLD, Warned, read_logs


def write(
    run: Path, monkeypatch: pytest.MonkeyPatch, rank: int, texts: list[str], error: bool = False
) -> None:
    """As that rank would, through the run's own logging."""
    monkeypatch.setattr(core_logging, "rank", lambda: rank)
    monkeypatch.setattr(core_logging, "is_main", lambda: False)

    def run_and_fail() -> None:
        with logging_to(run):
            for text in texts:
                get_logger("cantata.test").warning(text)
            if error:
                raise ValueError(f"rank {rank} broke")

    if error:
        with pytest.raises(ValueError, match="broke"):
            run_and_fail()
    else:
        run_and_fail()


def test_warnings_are_counted_over_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, 0, ["slow", "slow", "full"])
    write(tmp_path, monkeypatch, 10, ["slow"])
    found = read_logs(tmp_path / "logs")
    assert found.warnings == [Warned("slow", 3, [0, 10]), Warned("full", 1, [0])]
    assert (found.failed, [tail.name for tail in found.tails]) == (0, ["rank-0.log"])


def test_ranks_that_failed_speak_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, 0, ["fine"] * (2 * TAIL))
    for rank in range(1, TOLD + 3):
        write(tmp_path, monkeypatch, rank, [], error=True)
    found = read_logs(tmp_path / "logs")
    assert found.failed == TOLD + 2
    assert [tail.name for tail in found.tails] == [f"rank-{rank}.log" for rank in range(1, TOLD + 1)]
    assert "ValueError: rank 1 broke" in found.tails[0].text
    assert "Traceback" in found.tails[0].text


def test_only_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, 0, [f"line {n}" for n in range(200)])
    [tail] = read_logs(tmp_path / "logs").tails
    assert len(tail.text.splitlines()) == TAIL
    assert "line 199" in tail.text


def test_no_logs_are_no_warnings(tmp_path: Path) -> None:
    assert read_logs(tmp_path / "logs") == ([], [], 0)
