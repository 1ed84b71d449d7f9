"""Rows of all ranks as one tensor, through which gradients go back to the ranks that they came from.

n  rows of this rank    N  rows of all ranks    D  width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from cantata.core.dist import rank, world_size


class Gathered(NamedTuple):
    """Rows of all ranks, in the order of ranks."""

    rows_ND: Tensor
    start: int
    """Where this rank's own begin."""


def gather_rows(x_nD: Tensor) -> Gathered:
    """A collective; ranks may hold different numbers of rows, or none.

    The gradient of a row is the sum of those that all ranks have for it: exactly what it would be if one
    process held every row and every loss.
    """
    if world_size() == 1:
        return Gathered(x_nD, 0)
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x_nD.device)
    counts[rank()] = len(x_nD)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    rows_ND: Tensor = _Gather.apply(x_nD, sizes)  # type: ignore[no-untyped-call]
    return Gathered(rows_ND, sum(sizes[: rank()]))


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # One size for all: backends gather nothing else.
        padded = x_nD.new_zeros(max(sizes), *x_nD.shape[1:])
        padded[: len(x_nD)] = x_nD
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        total = grad_ND.contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: rank()])
        return total[start : start + ctx.sizes[rank()]], None
