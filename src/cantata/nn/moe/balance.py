"""How tokens are kept spread over the experts: balance losses, and the bias that needs no loss.

G  groups of experts that the Switch loss balances
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint
from cantata.core.types import MODALITIES, RouterStats
from cantata.nn.moe.layer import MoELayer


@dataclass(frozen=True)
class BalanceConfig:
    """The keys under `balance` of a mixture of experts; a coefficient of 0 leaves its term out."""

    aux_loss_coef: float
    """Weight of the Switch loss over all tokens together."""
    aux_loss_groups: int
    """Equal groups of consecutive experts that the Switch losses balance; `num_experts` balances each one."""
    modality_aux_loss_coef: Mapping[str, float]
    """Weights of Switch losses over the tokens of one modality each: {text: 1e-3} balances text alone."""
    sequence_aux_loss_coef: float
    """Weight of the Switch loss inside every sample."""
    z_loss_coef: float
    """Weight of the mean squared logsumexp of the router's logits."""
    bias_update_rate: float
    """Step of the loss-free balance bias; 0 builds the routers without one."""

    def __post_init__(self) -> None:
        for name, value in self._numbers().items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"balance.{name}={value} must be a number, at least 0 (0 leaves it out)")
        for name in self.modality_aux_loss_coef:
            if name not in MODALITIES:
                valid = ", ".join(MODALITIES)
                raise ConfigError(
                    f"balance.modality_aux_loss_coef.{name} is none of {valid}{hint(name, MODALITIES)}"
                )

    def check(self, num_experts: int) -> None:
        """Raise `ConfigError` where the groups do not divide the experts."""
        if self.aux_loss_groups < 1 or num_experts % self.aux_loss_groups:
            raise ConfigError(
                f"balance.aux_loss_groups={self.aux_loss_groups} must divide num_experts ({num_experts})"
            )

    def _numbers(self) -> dict[str, float]:
        by_modality = {f"modality_aux_loss_coef.{k}": v for k, v in self.modality_aux_loss_coef.items()}
        names = ("aux_loss_coef", "sequence_aux_loss_coef", "z_loss_coef", "bias_update_rate")
        return {name: getattr(self, name) for name in names} | by_modality


class Balance(NamedTuple):
    """What the routing of a micro-batch costs: this rank's share, summed over tokens."""

    loss_sum: Tensor
    """Every term with its coefficient, over all layers: a scalar with gradient."""
    sums: dict[str, Tensor]
    """Each term by layer without its coefficient, detached, fp32."""


def balance_loss(stats: RouterStats, counts_LME: Tensor, config: BalanceConfig) -> Balance:
    """The balance terms of all layers; divided by the step's tokens they are token-weighted means.

    With `n_g` the choices and `P_g` the summed probability of group g, and T tokens in the micro-batch, the
    Switch loss is `G / (k T^2) * sum_g(P_g n_g)` (Fedus et al. 2021, arXiv:2101.03961). Counts carry no
    gradient and the probabilities enter linearly, so each rank's own `P` with everybody's `n` gives shares
    that add up to the loss of the whole micro-batch, and gradients with them.

    Args:
        stats: of this rank's tokens, stacked over layers.
        counts_LME: `stats.tokens_per_expert_ME` summed over the data-parallel ranks, int64.
    """
    mass_LMG = _grouped(stats.mass_ME, config.aux_loss_groups)
    counts_LMG = _grouped(counts_LME.to(mass_LMG.dtype), config.aux_loss_groups)
    aux_L = _switch(mass_LMG.sum(1), counts_LMG.sum(1))
    aux_LM = _switch(mass_LMG, counts_LMG)
    loss_sum = (
        config.aux_loss_coef * aux_L.sum()
        + config.z_loss_coef * stats.z_sum.sum()
        + config.sequence_aux_loss_coef * stats.sequence_sum.sum()
    )
    for name, coef in config.modality_aux_loss_coef.items():
        loss_sum = loss_sum + coef * aux_LM[:, MODALITIES.index(name)].sum()
    sums = {"aux_loss_L": aux_L, "aux_loss_LM": aux_LM, "z_loss_L": stats.z_sum}
    if config.sequence_aux_loss_coef > 0:
        sums["sequence_aux_loss_L"] = stats.sequence_sum
    return Balance(loss_sum, {name: value.detach() for name, value in sums.items()})


def _grouped(values_LME: Tensor, groups: int) -> Tensor:
    return values_LME.view(*values_LME.shape[:-1], groups, -1).sum(-1)


def _switch(mass_G: Tensor, counts_G: Tensor) -> Tensor:
    """`T * G / (k T^2) * sum_g(P_g n_g)` over the last axis; k T is the sum of the counts."""
    choices = counts_G.sum(-1).clamp_min(1)
    return counts_G.shape[-1] * (mass_G * counts_G).sum(-1) / choices


@torch.no_grad()
def update_expert_bias(layers: Sequence[MoELayer], counts_LE: Tensor, rate: float) -> None:
    """Move every layer's `expert_bias_E` towards balance, once a step; a frozen router stays as it is.

    `delta = rate * sign(mean(n) - n)`, centred, with `n` the step's tokens per expert over all ranks
    (Wang et al., 2024, arXiv:2408.15664).
    """
    for layer, counts_E in zip(layers, counts_LE, strict=True):
        bias_E = layer.router.expert_bias_E
        if bias_E is None:
            raise ValueError("update_expert_bias: the router was built without an expert bias")
        if not layer.router.weight.requires_grad:
            continue
        counts_E = counts_E.to(bias_E.device, torch.float32)
        delta_E = rate * torch.sign(counts_E.mean() - counts_E)
        bias_E += delta_E - delta_E.mean()
