"""`logs/history.jsonl`: a line each time a run starts and each time it ends, so that both can be told later.

    {"event": "start", "time": "2026-11-28T10:32:38+00:00", "step": 40, "origin": ..., and `environment()`}
    {"event": "end", "time": ..., "step": 80, "outcome": "done", "exit_code": 0, "seconds": 92.1}

A start without an end was killed, or is running.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cantata.core import dist
from cantata.core.errors import CantataError, RunError

FILE = "logs/history.jsonl"
START, END = "start", "end"
FAILED = "failed"


class History:
    """Writes the file while its block runs, on rank 0 alone; an error that leaves the block is an end too.

    Args:
        out: the run directory.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        self._began = time.monotonic()

    def start(self, step: int, origin: str, environment: Mapping[str, Any]) -> None:
        """The run goes on from `step`. Raises `RunError` where the disk refuses."""
        self._write(START, {"step": step, "origin": origin, **environment})

    def end(self, step: int, outcome: str, exit_code: int) -> None:
        """The run ended in order. Raises `RunError` where the disk refuses."""
        self._end({"step": step, "outcome": outcome, "exit_code": exit_code})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        code = error.exit_code if isinstance(error, CantataError) else 1
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, CantataError):
            reason = f"{type(error).__name__}: {reason}"
        # Whatever ended the run is worth more than this line; a full disk may be what did.
        with contextlib.suppress(RunError):
            self._end({"outcome": FAILED, "error": reason, "exit_code": code})

    def _end(self, values: Mapping[str, Any]) -> None:
        self._write(END, {**values, "seconds": round(time.monotonic() - self._began, 3)})

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        if not dist.is_main():
            return
        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise RunError(f"{self._path}: cannot write: {error.strerror}") from error
