"""Moves tokens to their experts and back.

R  rows: one for each (token, chosen expert), sorted by expert
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cantata.nn.moe.router import count


class Dispatched(NamedTuple):
    """What the experts get."""

    x_RD: Tensor
    """One row for each (token, expert) here, sorted by expert."""
    tokens_per_expert_E: Tensor
    """Rows of each expert held here, int64."""
    state: Any
    """What `combine` needs to undo the move; only the dispatcher that made it looks inside."""


class Dispatcher(Protocol):
    """Brings tokens to experts wherever they live, and their results back, differentiably."""

    def dispatch(self, x_TD: Tensor, expert_index_TK: Tensor) -> Dispatched:
        """Copy each token once for each expert it chose, sorted by expert."""
        ...

    def combine(self, y_RD: Tensor, weights_TK: Tensor, state: Any) -> Tensor:
        """Sum each token's K results with its weights: (T, D)."""
        ...


class LocalDispatcher:
    """All experts are here: a permutation, and nothing travels.

    Every token appears in exactly K rows, so both directions are gathers: no scatter, no atomic sum.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, expert_index_TK: Tensor) -> Dispatched:
        order = Order.of(expert_index_TK)
        x_RD: Tensor = _Expand.apply(x_TD, *order)  # type: ignore[no-untyped-call]
        return Dispatched(x_RD, count(expert_index_TK, self.num_experts), order)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, state: Order) -> Tensor:
        y_TD: Tensor = _Reduce.apply(y_RD, weights_TK, *state)  # type: ignore[no-untyped-call]
        return y_TD


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


def sum_rows(x_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's K rows, in one pass: (T, D)."""
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
