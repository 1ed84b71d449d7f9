"""What every engine offers the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from cantata.core.types import StepTotals
from cantata.train.optim import GroupSummary


class Loss(NamedTuple):
    """A micro-batch's share of the step.

    Shares add up: over all micro-batches and ranks they sum to the step's loss and metrics,
    so token-weighted accumulation is right once, for every stage and engine.
    """

    value: Tensor
    """Scalar with gradient; divided by the step's totals already."""
    sums: dict[str, Tensor]
    """Detached sums that are added over micro-batches and ranks (never means)."""


class Objective(Protocol):
    """Turns a model and a micro-batch into its share of the step's loss."""

    def __call__(self, model: nn.Module, batch: Any, totals: StepTotals) -> Loss: ...


class Engine(Protocol):
    """Owns the sharded model and its optimizer; sums gradients over ranks."""

    model: nn.Module
    """The wrapped model, to call in evaluation."""
    summary: Sequence[GroupSummary]
    """What is trained and what is frozen, group by group."""
    settings: str
    """The engine and its options in one line, for the start-up report."""

    def forward_backward(
        self, batch: Any, objective: Objective, totals: StepTotals, *, last: bool
    ) -> dict[str, Tensor]:
        """Add this micro-batch's gradients; returns the objective's sums.

        `last` marks the step's final micro-batch.
        """
        ...

    def gradient_norm(self, max_norm: float | None) -> float:
        """Global L2 norm of the summed gradients before clipping to `max_norm`; clips in place."""
        ...

    def step(self, learning_rate_factor: float) -> None:
        """Update the parameters with each group's base rate times the factor, then clear gradients."""
        ...

    def skip(self) -> None:
        """Clear gradients without an update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors under layout-independent names: `model.<parameter>`, `optimizer.<parameter>.<state>`.

        Sharded (DTensor) or whole. A whole tensor may be offered by one rank alone.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the tensors of `state_dict` back."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the averages that its optimizer keeps.

        Afterwards every bit is as before. Nothing changes where the optimizer keeps none, or before the first
        step. Neither train nor save inside; a collective.
        """
        ...
