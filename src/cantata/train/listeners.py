"""What happens after a step besides the next one: the balance bias, the metrics line, the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from cantata.core.errors import ConfigError
from cantata.data.loader import Loader
from cantata.nn.moe.balance import BalanceConfig, update_expert_bias
from cantata.nn.moe.layer import MoELayer
from cantata.nn.quantize.base import Quantizer
from cantata.train.best import Best
from cantata.train.checkpoint import Checkpointer
from cantata.train.engine import Engine
from cantata.train.loggers import Sinks
from cantata.train.loop import Progress, StepResult
from cantata.train.progress import Console
from cantata.train.reconstruction import STATISTICS
from cantata.train.window import Window


class ExpertBias:
    """Moves the routers' balance biases once a step; a rate of 0 leaves them alone."""

    def __init__(self, layers: Sequence[MoELayer], balance: BalanceConfig | None) -> None:
        self._layers = layers
        self._rate = 0.0 if balance is None else balance.bias_update_rate

    def after_step(self, result: StepResult) -> None:
        if self._rate > 0:
            update_expert_bias(self._layers, result.sums["tokens_per_expert_LME"].sum(1), self._rate)


class Codebook:
    """Lets an image tokenizer's quantiser learn from the step's statistics, summed over all ranks."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer

    def after_step(self, result: StepResult) -> None:
        self._quantizer.update(
            {
                name.removeprefix(STATISTICS): value
                for name, value in result.sums.items()
                if name.startswith(STATISTICS)
            }
        )


class Telemetry:
    """Writes a metrics line every `log_every` steps, after the last one, and where a listener adds to it."""

    def __init__(
        self,
        window: Window,
        sinks: Sinks,
        console: Console,
        *,
        base_learning_rate: float,
        log_every: int,
        max_steps: int,
    ) -> None:
        self._window = window
        self._sinks = sinks
        self._console = console
        self._base_learning_rate = base_learning_rate
        self._log_every = log_every
        self._max_steps = max_steps
        self.last_loss: float | None = None

    def after_step(self, result: StepResult) -> None:
        self._window.add(result)
        step = result.progress.step
        if step % self._log_every and step != self._max_steps and not result.extra:
            return
        record = self._window.record(result, self._base_learning_rate) | result.extra
        self.last_loss = record["loss"]
        self._sinks.write(record)
        self._console.on_log(record)


class Kept(Protocol):
    """What a listener has gathered and not written yet; the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Saving:
    """Saves every `checkpoint.every` steps, after the last one, and where an evaluation is the best so far.

    It is the last listener: what others write of a step must be written before its checkpoint.

    Args:
        kept: what travels in a checkpoint besides model, optimizer, loader and progress, by its name there.
        best: which evaluation is the best so far; it is kept as `best`.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        engine: Engine,
        loader: Loader,
        kept: Mapping[str, Kept],
        console: Console,
        max_steps: int,
        best: Best,
    ) -> None:
        self._checkpointer = checkpointer
        self._engine = engine
        self._loader = loader
        self._kept = {**kept, "best": best}
        self._best = best
        self._console = console
        self._max_steps = max_steps
        self._untold: int | None = None

    def resume(self) -> Progress:
        """Continue from the checkpoint that the configuration asks for, or start anew where there is none.

        Raises `ConfigError` where the checkpoint lacks something kept.
        """
        path = self._checkpointer.resume_from(self._console.on_warning)
        if path is None:
            return Progress()
        document = self._checkpointer.load(path, self._engine)
        extra = document["extra"]
        self._loader.load_state_dict({**extra["loader"], "streams": document["loader"]})
        lacking = sorted(self._kept.keys() - extra.keys())
        if lacking:
            raise ConfigError(
                f"{path} was saved by another version: it lacks {', '.join(lacking)}; go on with that "
                "version, or start anew with another out="
            )
        for name, part in self._kept.items():
            part.load_state_dict(extra[name])
        # One that was removed by hand, or lies in another run's directory, is not here to be named.
        if self._best.step is not None and not self._checkpointer.keep_best(self._best.step):
            self._best.forget()
        return Progress(**extra["progress"])

    def after_step(self, result: StepResult) -> None:
        self._checkpointer.raise_if_failed()
        self._tell()
        step, every = result.progress.step, self._checkpointer.every
        best = self._best.update(step, result.extra)
        if best or step == self._max_steps or (every and step % every == 0):
            self.save(result.progress, best=best)

    def save(self, progress: Progress, *, best: bool = False) -> None:
        """Save now, unless this step is saved already; the save before it must have ended well."""
        self.finish()
        state = self._loader.state_dict()
        streams = state.pop("streams")
        extra = {"progress": asdict(progress), "loader": state}
        extra |= {name: part.state_dict() for name, part in self._kept.items()}
        if self._checkpointer.save(progress.step, self._engine, streams, extra, best=best):
            self._untold = progress.step
        self._tell()

    def finish(self) -> None:
        """Wait for the save under way. Raises `RunError` where it failed."""
        self._checkpointer.wait()
        self._tell()

    def _tell(self) -> None:
        if self._untold is not None and self._checkpointer.is_saved:
            self._console.on_checkpoint(self._untold, self._checkpointer.path(self._untold))
            self._untold = None
