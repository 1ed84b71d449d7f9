"""The one training loop.

Stages differ by objective, data and what is trained; this file is the same for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from cantata.core import dist
from cantata.core.errors import RunError
from cantata.core.types import MicroBatch, StepTotals
from cantata.train.config import TrainConfig
from cantata.train.engine import Engine, Objective
from cantata.train.metrics import Record, StepSums
from cantata.train.preempt import StopRequest
from cantata.train.schedule import Schedule
from cantata.train.watchdog import Watchdog


@dataclass(frozen=True)
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    """Tokens without padding, over all ranks, since the run began."""
    target_tokens: int = 0

    def after(self, totals: StepTotals) -> Progress:
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + totals.tokens,
            target_tokens=self.target_tokens + totals.target_tokens,
        )


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves for the metrics."""

    progress: Progress
    totals: StepTotals
    sums: Mapping[str, torch.Tensor]
    """The objective's sums over every micro-batch and rank, on the host."""
    grad_norm: float
    learning_rate_factor: float
    step_seconds: float
    data_seconds: float
    extra: Record = field(default_factory=dict)
    """What listeners add to the step's metrics line."""


class Listener(Protocol):
    """Hears of every step: metrics, evaluation and checkpoints are listeners."""

    def after_step(self, result: StepResult) -> None: ...


def fit(
    engine: Engine,
    objective: Objective,
    batches: Iterator[MicroBatch],
    schedule: Schedule,
    config: TrainConfig,
    listeners: list[Listener],
    start: Progress,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Progress:
    """Train from `start` to `config.max_steps`, until a signal asks to stop or a listener calls it enough.

    Returns the progress made; it falls short of `max_steps` only if a stop was requested.
    """
    progress = start
    while progress.step < config.max_steps and not stop.enough:
        started = time.perf_counter()
        watchdog.beat()
        micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        data_seconds = time.perf_counter() - started

        totals = count(micro_batches, progress.step + 1)
        sums, own_losses = StepSums(), []
        for index, batch in enumerate(micro_batches, start=1):
            batch = batch.to(dist.device(), non_blocking=True)
            part = engine.forward_backward(batch, objective, totals, last=index == len(micro_batches))
            sums.add(part)
            own_losses.append(part["loss_sum"])
            watchdog.beat()
        grad_norm = engine.gradient_norm(config.clip_grad_norm)
        sums.add({"stop": torch.tensor(float(stop.received), device=dist.device())})
        reduced = sums.reduced()
        check_finite(reduced["loss_sum"].item(), grad_norm, micro_batches, own_losses, progress.step + 1)
        factor = schedule(progress.step, config.max_steps)
        engine.step(factor)
        watchdog.rest()

        progress = progress.after(totals)
        seconds = time.perf_counter() - started
        result = StepResult(progress, totals, reduced, grad_norm, factor, seconds, data_seconds)
        for listener in listeners:
            listener.after_step(result)
        if reduced["stop"] > 0:
            break
    return progress


def count(micro_batches: list[MicroBatch], step: int) -> StepTotals:
    """Tokens and target tokens of the step over all ranks.

    Raises `RunError` where the whole step holds no target: its loss would be 0 / 0.
    """
    tokens = sum(batch.num_tokens for batch in micro_batches)
    targets = sum(batch.num_targets for batch in micro_batches)
    weight = sum(batch.target_weight for batch in micro_batches)
    all_tokens, all_targets, all_weight = dist.all_reduce_sum([tokens, targets, weight])
    totals = StepTotals(round(all_tokens), round(all_targets), all_weight)
    if totals.target_tokens == 0:
        raise RunError(
            f"step {step}: no token of the batch carries a target ({describe(micro_batches)}); "
            "check what the sources and the collator train on"
        )
    return totals


def check_finite(
    loss_sum: float,
    grad_norm: float,
    micro_batches: list[MicroBatch],
    own_losses: list[torch.Tensor],
    step: int,
) -> None:
    """Raise `RunError` before the parameters change; both numbers are the same on every rank.

    It names the micro-batches whose own loss sum, of `own_losses`, is not finite; where all are (the gradient
    overflowed), every sample of the step.
    """
    if math.isfinite(loss_sum) and math.isfinite(grad_norm):
        return
    culprits = [
        f"loss sum {loss.item():g} on rank {dist.rank()} in {batch.describe()}"
        for batch, loss in zip(micro_batches, own_losses, strict=True)
        if not math.isfinite(loss.item())
    ]
    told = "; ".join(filter(None, dist.gather_strings("; ".join(culprits))))
    told = told or f"each micro-batch's loss is; the step's samples: {describe(micro_batches)}"
    raise RunError(
        f"step {step}: loss sum {loss_sum:g} and gradient norm {grad_norm:g} are not both finite ({told}); "
        "nothing was updated: mend or leave out the sample, or lower the learning rate, and run the same "
        "command again"
    )


def describe(micro_batches: list[MicroBatch]) -> str:
    """The samples of every rank's micro-batches."""
    return "; ".join(dist.gather_strings("; ".join(batch.describe() for batch in micro_batches)))
