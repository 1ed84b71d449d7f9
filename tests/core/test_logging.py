import logging
import warnings
from pathlib import Path

import pytest

from cantata.core.logging import console, get_logger, logging_to


def test_lines_and_warnings_reach_the_rank_file_and_the_console(tmp_path: Path) -> None:
    with logging_to(tmp_path), console.capture() as shown:
        get_logger("cantata.test").info("step %d", 3)
        warnings.warn("mind the gap", stacklevel=1)
    text = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "INFO cantata.test: step 3" in text
    assert "mind the gap" in text
    assert "step 3" in shown.get()


def test_other_ranks_write_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with logging_to(tmp_path), console.capture() as shown:
        get_logger("cantata.test").info("hello")
    assert "hello" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert shown.get() == ""


def test_a_failure_stands_in_the_file_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), logging_to(tmp_path):
        raise ValueError("boom")
    text = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "ValueError: boom" in text
    assert "Traceback" in text


def test_a_second_run_appends_and_nothing_stays_behind(tmp_path: Path) -> None:
    before = list(logging.getLogger("cantata").handlers)
    for word in ("first", "second"):
        with logging_to(tmp_path):
            get_logger("cantata.test").info(word)
    get_logger("cantata.test").info("third")
    text = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "first" in text
    assert "second" in text
    assert "third" not in text
    assert logging.getLogger("cantata").handlers == before
