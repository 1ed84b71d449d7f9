"""Where the lines of metrics go besides the terminal: `metrics.jsonl`, W&B, TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cantata.core.errors import ConfigError
from cantata.train.metrics import MetricsFile


@dataclass(frozen=True)
class LoggerConfig:
    """The keys under `logger`; `metrics.jsonl` is always written."""

    wandb: bool
    """Weights & Biases: online where this machine is logged in or WANDB_MODE says so, else offline."""
    tensorboard: bool
    """TensorBoard event files in `<out>/tensorboard`."""

    def __post_init__(self) -> None:
        for key, module, wanted in (
            ("wandb", "wandb", self.wandb),
            ("tensorboard", "tensorboard", self.tensorboard),
        ):
            if wanted and importlib.util.find_spec(module) is None:
                raise ConfigError(
                    f"logger.{key}=true needs a package that is not installed: pip install 'cantata[{key}]', "
                    f"or set logger.{key}=false"
                )


class Logger(Protocol):
    """Takes lines of metrics, by rank 0 alone."""

    def write(self, record: Mapping[str, float | int | None]) -> None:
        """Take a line; it holds `step`, and None where a value does not exist."""
        ...

    def close(self) -> None: ...

    notice: str
    """One line that says where its output is, for the start of the run."""


class WandbLogger:
    """One W&B run for the whole life of a run directory: its id is kept there and resumed.

    W&B's own step only grows, so the charts use our `step`: a run that resumes behind its last line still
    shows every line. W&B itself prints nothing; `notice` says where the run is.
    """

    def __init__(self, out: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = out / "wandb" / "run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        mode_is_set = "WANDB_MODE" in os.environ
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow",
            name=name,
            project=os.environ.get("WANDB_PROJECT", "cantata"),
            dir=str(out),
            config=dict(config),
            mode=None if mode_is_set or wandb.login(prompt=False, verify=False) else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        folder = Path(self._run.dir).parent
        where = f"offline; upload with: wandb sync --append {folder}" if self._run.offline else self._run.url
        self.notice = f"W&B {where}"

    def write(self, record: Mapping[str, float | int | None]) -> None:
        self._run.log({name: value for name, value in record.items() if value is not None})

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """Scalars in `<out>/tensorboard`; events after the step that a run resumes from are hidden."""

    def __init__(self, out: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge_step)
        self.notice = f"TensorBoard: tensorboard --logdir {out / 'tensorboard'}"

    def write(self, record: Mapping[str, float | int | None]) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Sinks:
    """Every place that keeps lines of metrics. Ranks other than 0 hold none; writing does nothing there."""

    def __init__(self, sinks: Sequence[MetricsFile | Logger]) -> None:
        self._sinks = sinks
        self.notices = [sink.notice for sink in sinks if not isinstance(sink, MetricsFile)]

    def write(self, record: Mapping[str, float | int | None]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_sinks(
    logger: LoggerConfig, out: Path, name: str, config: Mapping[str, Any], resume_step: int | None, rank: int
) -> Sinks:
    """Open `<out>/metrics.jsonl` and the loggers asked for; nothing on ranks other than 0.

    Args:
        out: the run directory; it exists.
        config: the resolved configuration, uploaded to W&B.
        resume_step: the step that the run goes on from; None for a run from scratch.

    Raises:
        RunError: an existing `metrics.jsonl` cannot be continued.
    """
    if rank != 0:
        return Sinks([])
    sinks: list[MetricsFile | Logger] = [MetricsFile(out / "metrics.jsonl", resume_step)]
    if logger.wandb:
        sinks.append(WandbLogger(out, name, config))
    if logger.tensorboard:
        sinks.append(TensorBoardLogger(out, resume_step))
    return Sinks(sinks)
