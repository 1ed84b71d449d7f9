"""Loss-free balancing: experts with too few tokens are preferred a little more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cantata.nn.moe.layer import MoELayer


@torch.no_grad()
def update_expert_bias(layers: Sequence[MoELayer], counts_LE: Tensor, rate: float) -> None:
    """Move every layer's `expert_bias_E` towards balance, once a step.

    `delta = rate * sign(mean(n) - n)`, centred, with `n` the step's tokens per expert over all ranks
    (Wang et al., 2024, arXiv:2408.15664).
    """
    for layer, counts_E in zip(layers, counts_LE, strict=True):
        bias_E = layer.router.expert_bias_E
        if bias_E is None:
            raise ValueError("update_expert_bias: the router was built without an expert bias")
        counts_E = counts_E.to(bias_E.device, torch.float32)
        delta_E = rate * torch.sign(counts_E.mean() - counts_E)
        bias_E += delta_E - delta_E.mean()
