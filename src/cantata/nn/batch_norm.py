"""Batch normalisation over all ranks.

N  images or clips of a micro-batch    C  channels    M  values of a channel in a micro-batch
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cantata.core.dist import all_reduce_sum, world_size


class BatchNorm(nn.Module):
    """Normalises each channel by its mean and variance (Ioffe and Szegedy, 2015, arXiv:1502.03167).

    In training they are those of the micro-batches of all ranks together, and the running ones move by
    `momentum` towards them, with the unbiased variance, the same on every rank: each must call it equally
    often. In evaluation the running ones serve. Statistics are fp32, whatever the input's dtype.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (N, C, ...) normalised, in its dtype."""
        weight, bias = self.weight.float(), self.bias.float()
        if self.training and world_size() > 1:
            return self._over_ranks(x.float(), weight, bias).to(x.dtype)
        if self.training:
            self.num_batches_tracked += 1
        y = F.batch_norm(
            x.float(),
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return y.to(x.dtype)

    def _over_ranks(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows_CM = x.transpose(0, 1).flatten(1)
        sums = summed_over_ranks(torch.cat((rows_CM.sum(1), rows_CM.new_tensor([rows_CM.shape[1]]))))
        count, mean_C = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred_CM = rows_CM - mean_C[:, None]
        # A second pass, since the mean of squares less the squared mean loses digits where the mean is large.
        var_C = summed_over_ranks(centred_CM.square().sum(1)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * (count / (count - 1)), self.momentum)
        y_CM = centred_CM * (torch.rsqrt(var_C + self.eps) * weight)[:, None] + bias[:, None]
        return y_CM.reshape(x.transpose(0, 1).shape).transpose(0, 1)


def summed_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks on every rank; so is its gradient, since each rank's loss is a part of the whole."""
    total: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)
