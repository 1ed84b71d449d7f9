"""A run directory, read as it is: while it trains, after it, or after it failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cantata.core.config import read_config
from cantata.core.errors import ConfigError
from cantata.tools.report.experts import Experts, read_experts
from cantata.tools.report.logs import Logs, read_logs
from cantata.tools.report.metrics import Metrics, read_metrics
from cantata.tools.report.samples import Samples, read_samples
from cantata.tools.report.state import Start, State, read_history, state_of

CONFIG, METRICS, STARTUP = "config.yaml", "metrics.jsonl", "logs/startup.txt"


@dataclass(frozen=True)
class Run:
    """Everything that a page tells of a run."""

    label: str
    """Its name among the runs of the page."""
    path: Path
    config: dict[str, Any]
    config_text: str
    metrics: Metrics
    starts: list[Start]
    state: State
    startup: str
    """The start-up report; empty where there is none."""
    logs: Logs
    experts: Experts
    samples: Samples

    @property
    def max_steps(self) -> int | None:
        return _max_steps(self.config)

    @property
    def resumes(self) -> list[int]:
        """Steps from which the run went on, by its history or by repeated lines of metrics."""
        told = {start.step for start in self.starts if start.step}
        return sorted(told | {restart.step - 1 for restart in self.metrics.restarts})


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories. Raises `ConfigError` for one that is none, or is named twice."""
    for path in paths:
        _check(path)
    places = Counter(path.resolve() for path in paths)
    for path in paths:
        if places[path.resolve()] > 1:
            raise ConfigError(f"{path} is named twice")
    return [_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _check(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"{path}: no such directory; name run directories, such as outputs/aria_mini")
    for name in (CONFIG, METRICS):
        if not (path / name).is_file():
            raise ConfigError(f"{path} is no run directory: it holds no {name}")


def _labels(paths: Sequence[Path]) -> list[str]:
    """The directories' names, with as many of their parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-length:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("different directories have different paths")


def _read(path: Path, label: str) -> Run:
    config = read_config(path / CONFIG)
    try:
        metrics, logs = read_metrics(path / METRICS), read_logs(path / "logs")
        config_text = (path / CONFIG).read_text(encoding="utf-8")
        startup = path / STARTUP
        shown = startup.read_text(encoding="utf-8", errors="replace") if startup.is_file() else ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.filename}: {error.strerror}") from error
    starts = read_history(path)
    return Run(
        label=label,
        path=path,
        config=config,
        config_text=config_text,
        metrics=metrics,
        starts=starts,
        state=state_of(path, starts, metrics.last_step, _max_steps(config)),
        startup=shown,
        logs=logs,
        experts=read_experts(path / "experts" / "counts.npy"),
        samples=read_samples(path / "samples"),
    )


def _max_steps(config: dict[str, Any]) -> int | None:
    train = config.get("train")
    steps = train.get("max_steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None
