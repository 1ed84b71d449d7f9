"""Held-out loss: the training objective over every held-out sample, once, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from cantata.core import dist
from cantata.core.errors import ConfigError, RunError
from cantata.core.suggest import hint
from cantata.core.types import MODALITIES, MicroBatch, StepTotals
from cantata.train.engine import Engine, Objective
from cantata.train.loop import StepResult
from cantata.train.metrics import Record, StepSums, evaluation_metrics, loss_metrics

UNSCALED = StepTotals(tokens=1, target_tokens=1, target_weight=1.0)
"""Totals of an evaluation: its sums are divided once, when every batch has been seen."""


class Shown(NamedTuple):
    """What a probe found."""

    record: Record
    """Values for the evaluation's metrics, the same on every rank."""
    lines: list[str]
    """What the model said, for people."""


Probe = Callable[[int, Engine], Shown]
"""Looks at what the model does (captions, answers) after a held-out pass; a collective, given the step."""


@runtime_checkable
class Measures(Protocol):
    """An objective whose sums say more than losses."""

    def measured(self, sums: Mapping[str, Tensor]) -> Record:
        """What an evaluation adds to the losses; `sums` are reduced over ranks."""
        ...


def evaluate(
    engine: Engine, objective: Objective, passes: Iterable[tuple[str, Iterable[MicroBatch]]]
) -> Record:
    """The metrics of one pass over each source: of all of them, by modality and by source.

    Every rank must be given the same sources, and of each the same number of batches.
    Raises `RunError` where there is no batch at all: every held-out sample was left out.
    """
    model = engine.model
    model.eval()
    totals: dict[str, Tensor] = {}
    by_source: Record = {}
    with torch.no_grad():
        for source, batches in passes:
            sums, empty = StepSums(), True
            for batch in batches:
                empty = False
                sums.add(objective(model, batch.to(dist.device()), UNSCALED).sums)
            if empty:
                continue
            reduced = sums.reduced()
            by_source[source_key(source)] = loss_metrics(reduced)["loss"]
            totals = {name: value + totals.get(name, 0.0) for name, value in reduced.items()}
    model.train()
    if not totals:
        raise RunError(
            "evaluation: every held-out sample was left out (unreadable, or longer than a row); "
            "mend data.held_out, or set train.eval_every=0"
        )
    own = objective.measured(totals) if isinstance(objective, Measures) else {}
    return evaluation_metrics(totals) | own | by_source


def source_key(source: str) -> str:
    """`eval/loss/<source>`; with `source/` before the name where a modality has it already."""
    return f"eval/loss/source/{source}" if source in MODALITIES else f"eval/loss/{source}"


class Evaluation:
    """A listener that evaluates every `every` steps and after the last one, into that step's metrics line.

    Args:
        run: makes the record of a step's pass, and shows it; a collective, called by every rank.
        every: steps between two passes; 0 never evaluates.
        max_steps: the run's last step.
        wanted: metrics that something else of the run goes by, by the key that names them.
    """

    def __init__(
        self,
        run: Callable[[int], Record],
        every: int,
        max_steps: int,
        wanted: Mapping[str, str],
    ) -> None:
        self._run = run
        self._every = every
        self._max_steps = max_steps
        self._wanted = wanted
        self._initial: Record = {}
        self.first_loss: float | None = None
        """Held-out loss before the first step, where this process made it."""
        self.last_loss: float | None = None

    def before_first_step(self) -> None:
        """Evaluate the model as it starts; the first step's line carries it as `eval/initial/...`."""
        if self._every:
            record = self._pass(step=0)
            self.first_loss = self.last_loss
            self._initial = {
                name.replace("eval/", "eval/initial/", 1): value for name, value in record.items()
            }

    def after_step(self, result: StepResult) -> None:
        result.extra.update(self._initial)
        self._initial = {}
        step = result.progress.step
        if self._every and (step % self._every == 0 or step == self._max_steps):
            result.extra.update(self._pass(step))

    def _pass(self, step: int) -> Record:
        """Raises `ConfigError` where a wanted metric is none of the record's."""
        record = self._run(step)
        for key, metric in self._wanted.items():
            if metric not in record:
                raise ConfigError(
                    f"{key}={metric} is no value of this run's evaluations{hint(metric, record)}"
                )
        self.last_loss = record["eval/loss"]
        return record
