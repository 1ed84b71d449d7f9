"""What the user sees while a run trains: a live line on a terminal, plain lines everywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from cantata.core import logging as core_logging
from cantata.train import humane, startup
from cantata.train.startup import StartupReport

Record = Mapping[str, float | int | None]

ROOMY = 100
"""Columns from which on the live line has a bar and wide gaps."""
PACE_LOGS = 50
"""Logged lines over which the time left is estimated; evaluation and saving are inside it."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    outcome: str
    """`done`, or why it stopped: `stopped by signal, run the same command again`."""
    step: int
    seconds: float
    out: Path
    loss: float | None
    held_out_before: float | None
    held_out_after: float | None


class Console:
    """Tells the user how the run goes; the loop calls it and never asks what it writes to.

    On a terminal rank 0 shows one live line below what it has printed. In a pipe, in CI or on a dumb terminal
    it prints a plain line a log to standard output. Other ranks print warnings only, to standard error. A
    reader that goes away (a closed pipe) ends the output, never the run. Everything goes to the rank's log
    file too. Warnings, those that other modules log included, are counted and repeated at the end.

    Args:
        rank: of this process.
        stream: plain lines go there; standard output where None.
        terminal: the console that log lines share, so that neither tears the other.
    """

    def __init__(
        self, rank: int, stream: TextIO | None = None, terminal: RichConsole = core_logging.console
    ) -> None:
        self._rank = rank
        self._stream = sys.stdout if stream is None else stream
        self._terminal = terminal
        self._live = (
            rank == 0 and self._stream.isatty() and terminal.is_terminal and not terminal.is_dumb_terminal
        )
        self._closed_pipe = False
        self._progress: Progress | None = None
        self._warnings = _WarningCounter()
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_LOGS)
        self._max_steps = 0
        self._rate_unit = "tok/s"
        self._gap = "  " if terminal.width >= ROOMY else " "

    def on_start(self, report: StartupReport, step: int = 0) -> None:
        """Show the start-up report; the run goes on from `step`."""
        for name in core_logging.SOURCES:
            logging.getLogger(name).addHandler(self._warnings)
        self._max_steps = report.max_steps
        self._rate_unit = "tok/s" if report.world_size == 1 else "tok/s/dev"
        if self._rank != 0:
            return
        if not self._live:
            self._line(startup.as_text(report))
            return
        self._terminal.print(
            startup.render(report), width=min(self._terminal.width, startup.WIDTH), highlight=False
        )
        self._terminal.print()
        self._progress = _progress_line(self._terminal)
        self._progress.add_task("train", total=report.max_steps, completed=step, figures="")
        self._progress.start()
        # A killed process cannot bring a hidden cursor back.
        self._terminal.show_cursor(True)

    def on_log(self, record: Record) -> None:
        """Show a line of metrics."""
        step = int(record["step"] or 0)
        self._pace.append((time.monotonic(), step))
        if self._rank != 0:
            return
        figures = self._figures(record, step)
        width = len(str(self._max_steps))
        line = "  ".join([f"step {step:>{width}}/{self._max_steps}", *figures])
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, figures=self._gap.join(figures))
            self._progress.refresh()
        else:
            self._line(line)
        _log(logging.INFO, line)

    def on_eval(self, step: int, record: Record) -> None:
        """Show the losses of a held-out pass, and how many answers were right."""
        values = [
            f"{name.removeprefix('eval/')} {humane.value(value, '.4f')}"
            for name, value in record.items()
            if name.startswith(("eval/loss", "eval/accuracy", "eval/majority"))
        ]
        self._note(f"step {step}: held out  {'  '.join(values)}", "cyan")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._note(f"step {step}: saved {path}", "green")

    def on_note(self, text: str) -> None:
        """Say something in passing."""
        self._note(text, "dim")

    def on_warning(self, text: str) -> None:
        """Print a warning, on any rank; its repetitions are only counted."""
        _log(logging.WARNING, text)
        if self._warnings.texts[text] > 1:
            return
        if self._rank == 0:
            self._print(f"warning: {text}", "bold yellow")
        else:
            print(f"rank {self._rank}: warning: {text}", file=sys.stderr, flush=True)

    def on_end(self, summary: Summary) -> None:
        """Take the live line down, say how the run ended and repeat the warnings."""
        self.close()
        parts = [f"{summary.outcome}: step {summary.step} in {humane.duration(summary.seconds)}"]
        if summary.loss is not None:
            parts.append(f"loss {summary.loss:.4f}")
        if summary.held_out_after is not None:
            before = "" if summary.held_out_before is None else f"{summary.held_out_before:.4f} -> "
            parts.append(f"held out {before}{summary.held_out_after:.4f}")
        self._note(", ".join([*parts, f"in {summary.out}"]), "bold")
        if self._rank == 0 and self._warnings.texts:
            self._print(f"warnings: {self._warnings.texts.total()}", "bold yellow")
            for text, times in self._warnings.texts.items():
                self._print(f"  {text}" + (f" ({times} times)" if times > 1 else ""), "yellow")

    def close(self) -> None:
        """Take the live line down; safe to call twice, and after an error."""
        for name in core_logging.SOURCES:
            logging.getLogger(name).removeHandler(self._warnings)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _figures(self, record: Record, step: int) -> list[str]:
        seconds = record["step_seconds"] or 0.0
        waiting = (record["data_seconds"] or 0.0) / seconds if seconds else 0.0
        return [
            f"loss {humane.value(record['loss'], '.4f')}",
            f"norm {humane.value(record['grad_norm'], '.2f')}",
            f"lr {humane.value(record['learning_rate'], '.1e')}",
            f"{humane.count(record['tokens_per_second_per_device'] or 0.0)} {self._rate_unit}",
            f"data {waiting:.0%}",
            f"eta {self._time_left(step, seconds)}",
        ]

    def _time_left(self, step: int, step_seconds: float) -> str:
        (then, first), (now, last) = self._pace[0], self._pace[-1]
        pace = (now - then) / (last - first) if last > first else step_seconds
        return humane.duration(pace * (self._max_steps - step))

    def _note(self, text: str, style: str) -> None:
        if self._rank == 0:
            self._print(text, style)
            _log(logging.INFO, text)

    def _print(self, text: str, style: str) -> None:
        if self._live:
            self._terminal.print(Text(text, style=style, overflow="fold"))
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        """A plain line, in whatever encoding the stream has; nothing more once its reader is gone."""
        if self._closed_pipe:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.rstrip("\n").encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._closed_pipe = True
            _redirect_to_nowhere(self._stream)


def _redirect_to_nowhere(stream: TextIO) -> None:
    # Python flushes standard output once more at exit, and would fail there and spoil the exit code.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _log(level: int, text: str) -> None:
    """A line for the log file alone: `shown` keeps it off the console, which has it already."""
    core_logging.get_logger("cantata.progress").log(level, "%s", text, extra={"shown": True})


class _WarningCounter(logging.Handler):
    """Counts warnings by their text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts[record.getMessage()] += 1


def _progress_line(console: RichConsole) -> Progress:
    # Without a refresh thread: a thread that holds a lock while the loader forks would hang the worker.
    bar = [BarColumn(bar_width=8)] if console.width >= ROOMY else []
    figures = TextColumn("{task.fields[figures]}", markup=False)
    return Progress(MofNCompleteColumn(), *bar, figures, console=console, auto_refresh=False)
