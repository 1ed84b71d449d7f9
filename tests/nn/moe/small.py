"""Settings of small mixtures for tests; everything is off unless asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cantata.core.types import TokenGroups
from cantata.nn.moe.balance import BalanceConfig
from cantata.nn.moe.router import TopKRouter


def balance(
    num_experts: int,
    *,
    aux: float = 0.0,
    groups: int | None = None,
    modality: Mapping[str, float] | None = None,
    sequence: float = 0.0,
    z: float = 0.0,
    bias: float = 0.0,
) -> BalanceConfig:
    return BalanceConfig(
        aux_loss_coef=aux,
        aux_loss_groups=num_experts if groups is None else groups,
        modality_aux_loss_coef=modality or {},
        sequence_aux_loss_coef=sequence,
        z_loss_coef=z,
        bias_update_rate=bias,
    )


def small_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    bias: bool = False,
    sequence: bool = False,
) -> TopKRouter:
    return TopKRouter(
        hidden_size,
        num_experts,
        top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        use_expert_bias=bias,
        sequence_stats=sequence,
    )


def one_sample(modality_T: Tensor) -> TokenGroups:
    """Everything that is not padding in one sample."""
    return TokenGroups(modality_T, (modality_T < 0).to(torch.int64), 1)
