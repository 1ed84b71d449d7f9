"""How evenly the experts are used: by layer, and by the modality of the tokens.

Shape suffixes as in `cantata.core.types`: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cantata.core.types import MODALITIES
from cantata.train.metrics import Record


def balance(tokens_per_expert_E: Tensor) -> dict[str, Tensor]:
    """Four views of how far a distribution of tokens over experts (last axis) is from even.

    Returns, without the last axis:
        load_max: the fullest expert's tokens over the ideal (the mean); 1 is even, E is one expert for all.
        load_mean: the load over the ideal that a token meets, mean over tokens: `E sum(n^2) / sum(n)^2`.
            1 is even, E is one expert for all. (The mean over experts is always 1 and says nothing.)
        dead_share: share of the experts without any token, in [0, 1].
        entropy: entropy over its maximum log E; 1 is even, 0 is one expert for all. With one expert, 1.

    A row without any token gives NaN.
    """
    counts_E = tokens_per_expert_E.to(torch.float64)
    num_experts = counts_E.shape[-1]
    share_E = counts_E / counts_E.sum(-1, keepdim=True)
    entropy = torch.special.entr(share_E).sum(-1)
    return {
        "load_max": share_E.amax(-1) * num_experts,
        "load_mean": share_E.square().sum(-1) * num_experts,
        "dead_share": torch.where(share_E.isnan(), share_E, (counts_E == 0).double()).mean(-1),
        "entropy": entropy / math.log(num_experts)
        if num_experts > 1
        else torch.ones_like(entropy) + 0 * entropy,
    }


def specialisation(tokens_per_expert_ME: Tensor) -> Tensor:
    """How differently the modalities use the experts: 0 is alike, 1 is no expert in common.

    The Jensen-Shannon divergence of the modalities' distributions over experts, each weighing the same,
    over its maximum (Lin, 1991, "Divergence measures based on the Shannon entropy"):
    `(H(mean_m p_m) - mean_m H(p_m)) / log m` over the m modalities that sent tokens. Equal weights keep it
    independent of how many tokens a modality has; a modality with few tokens looks specialised by chance.

    Args:
        tokens_per_expert_ME: counts, (..., M, E).

    Returns:
        Without the last two axes; NaN where fewer than two modalities sent tokens.
    """
    counts_ME = tokens_per_expert_ME.to(torch.float64)
    tokens_M1 = counts_ME.sum(-1, keepdim=True)
    share_ME = counts_ME / tokens_M1.clamp_min(1)
    modalities = (tokens_M1 > 0).sum(-2).double()
    mixture = torch.special.entr(share_ME.sum(-2) / modalities).sum(-1)
    parts = torch.special.entr(share_ME).sum((-1, -2)) / modalities[..., 0]
    index = (mixture - parts).clamp_min(0) / modalities[..., 0].log()
    return torch.where(modalities[..., 0] > 1, index, torch.nan)


def expert_metrics(tokens_per_expert_LME: Tensor) -> Record:
    """Names and values of `balance` for every layer, for each modality, and as means over layers.

    `experts/load_max` is the mean over layers, `experts/load_max/layer_00` a layer, and
    `experts/load_max/image` and `experts/load_max/image/layer_00` the same for image tokens alone.
    A modality that sent no token is left out. `load_mean`, `dead_share` and `entropy` are named alike;
    `experts/specialisation` has no modality of its own, and is left out where fewer than two sent tokens.
    """
    views = {"": balance(tokens_per_expert_LME.sum(1))}
    views[""]["specialisation"] = specialisation(tokens_per_expert_LME)
    for index, modality in enumerate(MODALITIES):
        views[f"/{modality}"] = balance(tokens_per_expert_LME[:, index])
    means: Record = {}
    layers: Record = {}
    for view, values in views.items():
        for name, value_L in values.items():
            seen = {layer: value for layer, value in enumerate(value_L.tolist()) if value == value}
            if seen:
                means[f"experts/{name}{view}"] = sum(seen.values()) / len(seen)
            layers |= {f"experts/{name}{view}/layer_{layer:02d}": value for layer, value in seen.items()}
    return means | layers
