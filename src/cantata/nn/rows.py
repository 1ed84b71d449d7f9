"""Picks rows of a tensor without the scattered sums that indexing's own backward makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def take_rows(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """`x_TD[index_N]`, where no row is named twice."""
    rows_ND: Tensor = _TakeRows.apply(x_TD, index_N)  # type: ignore[no-untyped-call]
    return rows_ND


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.shape = x_TD.shape
        return x_TD.index_select(0, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return grad_ND.new_zeros(ctx.shape).index_copy_(0, index_N, grad_ND), None
