"""Mistakes on a tool's command line: exit code 2 and one line, whatever the tool."""

from __future__ import annotations

import pytest

from cantata.cli import VERBS, main


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.module])
def test_an_unknown_option_is_one_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--no-such-option"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: cantata {verb}: ")
    assert shown.err.count("\n") == 1
