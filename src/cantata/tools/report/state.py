"""How a run stands: from its history, its lock and its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cantata.core.errors import PREEMPTED
from cantata.train.history import END, FAILED, FILE, START
from cantata.train.run_lock import is_held

FINISHED, RUNNING, STOPPED, BROKEN, UNKNOWN = "finished", "running", "preempted", "failed", "unknown"


class Start(NamedTuple):
    """Once that the run was started, and how that went."""

    begin: Mapping[str, Any]
    """The line of its start, with the environment."""
    end: Mapping[str, Any] | None
    """The line of its end; None where it has none."""

    @property
    def step(self) -> int:
        step = self.begin.get("step")
        return step if isinstance(step, int) else 0

    def seconds(self, now: datetime | None) -> float:
        """How long it ran, or, without an end, until `now`."""
        if self.end is not None:
            return float(self.end.get("seconds") or 0.0)
        return max(0.0, (now - _time(self.begin)).total_seconds()) if now is not None else 0.0


class State(NamedTuple):
    """A word, and what more there is to say."""

    word: str
    detail: str


def read_history(run: Path) -> list[Start]:
    """The starts of a run, oldest first; none of runs that keep no history. Broken lines are passed over."""
    starts: list[Start] = []
    try:
        lines = (run / FILE).read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(event, dict):
            continue
        if event.get("event") == START:
            starts.append(Start(event, None))
        elif event.get("event") == END:
            # An error before the start was written is an end of its own.
            begun = starts.pop() if starts and starts[-1].end is None else Start(event, None)
            starts.append(begun._replace(end=event))
    return starts


def state_of(run: Path, starts: Sequence[Start], last_step: int, max_steps: int | None) -> State:
    """How the run stands now."""
    if is_held(run):
        return State(RUNNING, f"since {shown_time(starts[-1].begin)}" if starts else "")
    if not starts:
        done = max_steps is not None and last_step >= max_steps
        return State(FINISHED if done else UNKNOWN, "" if done else f"no {FILE} tells how it ended")
    end = starts[-1].end
    if end is None:
        began = starts[-1].begin
        return State(
            BROKEN,
            f"it was killed, or runs where this machine cannot see it: started "
            f"{shown_time(began)} on {began.get('host', 'an unknown host')}, and no end is recorded",
        )
    if end.get("outcome") == FAILED:
        return State(BROKEN, str(end.get("error", "")))
    outcome = str(end.get("outcome", ""))
    word = STOPPED if end.get("exit_code") == PREEMPTED else FINISHED
    return State(word, "" if outcome == "done" else outcome)


def shown_time(event: Mapping[str, Any]) -> str:
    """`2026-11-28 10:32:38 UTC`."""
    return _time(event).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _time(event: Mapping[str, Any]) -> datetime:
    try:
        found = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
