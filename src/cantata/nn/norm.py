"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich, 2019).

    The statistics are fp32; the normalised value is rounded to the input's dtype before it is scaled,
    as Llama and Aria do.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        x32_TD = x_TD.float()
        scale_T1 = torch.rsqrt(x32_TD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32_TD * scale_T1).to(x_TD.dtype)
