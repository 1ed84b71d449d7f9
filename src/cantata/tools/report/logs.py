"""What the logs of a run tell: warnings, and the last words of one that failed."""

from __future__ import annotations

import re
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) ([\w.]+): (.*)")
"""The first line of a record, as `cantata.core.logging` writes it; a traceback's lines follow."""
TAIL = 40
"""Last lines of a log."""
TOLD = 4
"""Logs whose last lines are shown."""


class Warned(NamedTuple):
    """A warning, and how often which ranks gave it."""

    text: str
    times: int
    ranks: list[int]


class Tail(NamedTuple):
    """The end of a rank's log."""

    name: str
    text: str
    is_error: bool
    """Whether it ends with an error."""


class Logs(NamedTuple):
    """Of all ranks."""

    warnings: list[Warned]
    tails: list[Tail]
    """Of ranks that ended with an error, else of the first one; at most `TOLD`."""
    failed: int
    """Ranks whose log ends with an error."""


def read_logs(folder: Path) -> Logs:
    """Read every `rank-N.log`, line by line."""
    times: Counter[str] = Counter()
    ranks: dict[str, set[int]] = {}
    tails = []
    for path in sorted(folder.glob("rank-*.log"), key=_rank):
        last: deque[str] = deque(maxlen=TAIL)
        level = ""
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                last.append(line)
                match = RECORD.match(line)
                if match is None:
                    continue
                level = match[1]
                if level == "WARNING":
                    times[match[3]] += 1
                    ranks.setdefault(match[3], set()).add(_rank(path))
        tails.append(Tail(path.name, "".join(last), level == "ERROR"))
    failed = [tail for tail in tails if tail.is_error]
    warnings = [Warned(text, count, sorted(ranks[text])) for text, count in times.items()]
    return Logs(warnings, (failed or tails[:1])[:TOLD], len(failed))


def _rank(path: Path) -> int:
    number = path.stem.removeprefix("rank-")
    return int(number) if number.isascii() and number.isdigit() else -1
