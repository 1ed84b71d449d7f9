"""Held-out loss: the training objective over every held-out sample, once, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from cantata.core import dist
from cantata.core.errors import RunError
from cantata.core.types import Batch, StepTotals
from cantata.train.engine import Engine, Objective
from cantata.train.loop import StepResult
from cantata.train.metrics import Record, StepSums, evaluation_metrics

UNSCALED = StepTotals(tokens=1, target_tokens=1, target_weight=1.0)
"""Totals of an evaluation: its sums are divided once, when every batch has been seen."""


def evaluate(engine: Engine, objective: Objective, batches: Iterable[Batch]) -> Record:
    """The metrics of one pass. Every rank must be given the same number of batches.

    Raises `RunError` where there is none: every held-out sample was left out.
    """
    model = engine.model
    model.eval()
    sums, empty = StepSums(), True
    with torch.no_grad():
        for batch in batches:
            empty = False
            sums.add(objective(model, batch.to(dist.device()), UNSCALED).sums)
    model.train()
    if empty:
        raise RunError(
            "evaluation: every held-out sample was left out (unreadable, or longer than "
            "train.sequence_length); mend data.held_out, or set train.eval_every=0"
        )
    return evaluation_metrics(sums.reduced())


class Evaluation:
    """A listener that evaluates every `every` steps and after the last one, into that step's metrics line.

    Args:
        run: makes the record of one pass; a collective, called by every rank.
        tell: is called after each pass with the step and the record, to show it and what goes with it.
        every: steps between two passes; 0 never evaluates.
        max_steps: the run's last step.
    """

    def __init__(
        self, run: Callable[[], Record], tell: Callable[[int, Record], None], every: int, max_steps: int
    ) -> None:
        self._run = run
        self._tell = tell
        self._every = every
        self._max_steps = max_steps
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
        record = self._run()
        self.last_loss = record["eval/loss"]
        self._tell(step, record)
        return record
