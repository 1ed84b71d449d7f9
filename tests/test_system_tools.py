"""Tests of `tests/system_tools.py`."""

import pytest

from tests.system_tools import REQUIRED, need

ABSENT = "no-such-program-of-cantata"


def test_present_programs_are_no_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    need("sh", "ls")


def test_absent_ones_skip_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"{ABSENT} not found; `make system-tools`"):
        need("sh", ABSENT)


def test_they_fail_where_they_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=REQUIRED):
        need(ABSENT)
