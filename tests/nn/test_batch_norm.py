"""Batch norm over ranks against torch's on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata.nn.batch_norm import BatchNorm
from tests.distributed.spawn import run_ranks

CHANNELS, EPS, MOMENTUM = 3, 1e-5, 0.1
RANKS, STEPS = 2, 2


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Values that are not centred, and the weights of a loss."""
    generator = torch.Generator().manual_seed(step)
    shape = (5, CHANNELS, 2, 3, 4)
    return 1.0 + torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def part(whole: Tensor, rank: int) -> Tensor:
    """Uneven: two of the five clips are rank 0's."""
    return whole[:2] if rank == 0 else whole[2:]


def layer(kind: type[nn.Module]) -> Any:
    made = kind(CHANNELS, EPS, MOMENTUM)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        made.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    return made


def steps(norm: Any, rank: int | None) -> list[Tensor]:
    """Outputs, gradients of inputs and parameters, running statistics, and evaluation, step by step."""
    found: list[Tensor] = []
    for step in range(STEPS):
        x, weights = batch(step)
        if rank is not None:
            x, weights = part(x, rank), part(weights, rank)
        x.requires_grad_()
        y = norm(x)
        grads = torch.autograd.grad((y * weights).sum(), (x, norm.weight, norm.bias))
        found += [y.detach(), *grads]
    found += [buffer.clone() for buffer in norm.buffers()]
    x = batch(9)[0]
    found.append(norm.eval()(x if rank is None else part(x, rank)).detach())
    return found


def on_a_rank() -> list[Tensor]:
    return steps(layer(BatchNorm), dist.get_rank())


def test_one_rank_is_torchs() -> None:
    for ours, theirs in zip(steps(layer(BatchNorm), None), steps(layer(nn.BatchNorm3d), None), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_share_the_statistics_of_the_whole_batch() -> None:
    """Gradients of parameters are sums of 60 values each: they are held to 1e-5, all else to 1e-6."""
    ranks = run_ranks(on_a_rank, RANKS)
    whole = steps(layer(nn.BatchNorm3d), None)
    for position, theirs in enumerate(whole):
        values = [rank[position] for rank in ranks]
        kind = position % 4 if position < 4 * STEPS else None
        if theirs.dim() == 5:
            found = torch.cat(values)
        elif kind in (2, 3):
            found = torch.stack(values).sum(0)
        else:
            assert torch.equal(*values)
            found = values[0]
        atol = 1e-5 if kind in (2, 3) else 1e-6
        torch.testing.assert_close(found, theirs, atol=atol, rtol=1e-6)


def test_half_precision_keeps_its_statistics_in_fp32() -> None:
    norm = layer(BatchNorm).bfloat16()
    norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    x = batch(0)[0].bfloat16()
    assert norm(x).dtype is torch.bfloat16
    reference = layer(nn.BatchNorm3d)
    reference(x.float())
    torch.testing.assert_close(norm.running_mean, reference.running_mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm.running_var, reference.running_var, atol=1e-6, rtol=1e-6)
