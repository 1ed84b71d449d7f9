"""Moves tokens to their experts and back.

R  rows: one for each (token, chosen expert), sorted by expert
N  tokens where the experts are: all T of them, or rows that came from other processes
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cantata.nn.moe.router import count


class Order(NamedTuple):
    """The permutation that sorts (token, choice) pairs by expert."""

    token_R: Tensor
    """The token of each row."""
    row_TK: Tensor
    """The row of each (token, choice)."""
    choice_R: Tensor
    """The flat (token, choice) of each row."""

    @staticmethod
    def of(expert_index_TK: Tensor) -> Order:
        choice_R = expert_index_TK.flatten().argsort(stable=True)
        rows = torch.arange(choice_R.numel(), device=choice_R.device)
        row_TK = torch.empty_like(choice_R).index_copy_(0, choice_R, rows).view_as(expert_index_TK)
        return Order(choice_R // expert_index_TK.shape[1], row_TK, choice_R)


class Dispatched(NamedTuple):
    """What the experts get. Rows are named, not made: making them is the experts' own business."""

    x_ND: Tensor
    weights_NK: Tensor | None
    """What each row's result counts; None where it is not weighted yet."""
    tokens_per_expert_E: Tensor
    """Rows of each expert held here, int64."""
    order: Order
    """Of the N K rows, by the experts held here."""
    state: Any
    """What `combine` needs to undo the move; only the dispatcher that made it looks inside."""


class Dispatcher(Protocol):
    """Brings tokens to experts wherever they live, and their results back, differentiably.

    What runs between `send` and `receive` overlaps with the journey, in forward and in backward.
    """

    def send(self, x_TD: Tensor, weights_TK: Tensor, expert_index_TK: Tensor) -> Any:
        """Start tokens on their way to the experts that they chose."""
        ...

    def receive(self, sent: Any) -> Dispatched:
        """Wait for what `send` started."""
        ...

    def combine(self, y_ND: Tensor, state: Any) -> Tensor:
        """The weighted sum of each token's K results: (T, D)."""
        ...


class LocalDispatcher:
    """All experts are here: nothing travels, and what the experts sum is the result."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def send(self, x_TD: Tensor, weights_TK: Tensor, expert_index_TK: Tensor) -> Dispatched:
        """See `Dispatcher`."""
        counts_E = count(expert_index_TK, self.num_experts)
        return Dispatched(x_TD, weights_TK, counts_E, Order.of(expert_index_TK), None)

    def receive(self, sent: Dispatched) -> Dispatched:
        """See `Dispatcher`."""
        return sent

    def combine(self, y_ND: Tensor, state: None) -> Tensor:
        """See `Dispatcher`."""
        return y_ND


def expand(x_TD: Tensor, order: Order) -> Tensor:
    """One row for each (token, choice), sorted by expert: (R, D)."""
    x_RD: Tensor = _Expand.apply(x_TD, *order)  # type: ignore[no-untyped-call]
    return x_RD


def reduce(y_RD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """Each token's weighted sum over its rows: (T, D)."""
    y_TD: Tensor = _Reduce.apply(y_RD, weights_TK, *order)  # type: ignore[no-untyped-call]
    return y_TD


def by_row(weights_NK: Tensor | None, choice_R: Tensor) -> Tensor | None:
    """The weight of each row: (R, 1)."""
    return None if weights_NK is None else weights_NK.flatten()[choice_R][:, None]


def sum_rows(x_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's K rows, in one pass: (T, D).

    Every token appears in exactly K rows, so this is a gather: no scatter, no atomic sum.
    """
    if row_TK.shape[1] == 1 and weights_TK is None:
        return x_RD.index_select(0, row_TK[:, 0])
    if weights_TK is not None:
        weights_TK = weights_TK.to(x_RD.dtype)
    return F.embedding_bag(row_TK, x_RD, mode="sum", per_sample_weights=weights_TK)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor, choice_R: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (row_TK,) = ctx.saved_tensors
        return sum_rows(grad_RD, row_TK), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weights_TK: Tensor, token_R: Tensor, row_TK: Tensor, choice_R: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, token_R, row_TK, choice_R)
        return sum_rows(y_RD, row_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_RD, weights_TK, token_R, row_TK, choice_R = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, token_R)
        dots_R = (grad_RD * y_RD).sum(-1, dtype=torch.float32)
        grad_weights_TK = dots_R[row_TK].to(weights_TK.dtype)
        weights_R1 = weights_TK.flatten()[choice_R].to(y_RD.dtype)[:, None]
        return grad_RD.mul_(weights_R1), grad_weights_TK, None, None, None
