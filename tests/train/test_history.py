"""Starts and ends of a run, told later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError, RunError
from cantata.train.history import FILE, History


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FILE).read_text(encoding="utf-8").splitlines()]


def test_each_start_and_end_is_a_line(tmp_path: Path) -> None:
    for step, outcome, code in ((0, "stopped", 75), (40, "done", 0)):
        with History(tmp_path) as history:
            history.start(step, "from scratch", {"host": "näme", "ranks": 2})
            history.end(step + 40, outcome, code)
    told = lines(tmp_path)
    assert [one["event"] for one in told] == ["start", "end"] * 2
    assert [one["step"] for one in told] == [0, 40, 40, 80]
    assert told[0]["host"] == "näme"
    assert [one["exit_code"] for one in told[1::2]] == [75, 0]
    assert all(one["time"].endswith("+00:00") for one in told)
    assert all(one["seconds"] >= 0 for one in told[1::2])


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (RunError("step 3: not\n finite"), "step 3: not finite", 1),
        (ConfigError("no such key"), "no such key", 2),
        (KeyError("x"), "KeyError: 'x'", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt: KeyboardInterrupt", 1),
    ],
)
def test_an_error_is_an_end(tmp_path: Path, error: BaseException, said: str, code: int) -> None:
    def run() -> None:
        with History(tmp_path) as history:
            history.start(0, "from scratch", {})
            raise error

    with pytest.raises(type(error)):
        run()
    [_, end] = lines(tmp_path)
    assert (end["outcome"], end["error"], end["exit_code"]) == ("failed", said, code)


def test_a_full_disk_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    with pytest.raises(RunError, match=r"history\.jsonl: cannot write"), History(tmp_path) as history:
        history.start(0, "from scratch", {})
    with pytest.raises(RunError, match="what happened"), History(tmp_path):
        raise RunError("what happened")
