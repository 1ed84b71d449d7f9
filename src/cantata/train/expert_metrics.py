"""How evenly the experts are used: by layer, and by the modality of the tokens.

Shape suffixes as in `cantata.core.types`: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cantata.core.types import MODALITIES
from cantata.train.metrics import Record


def balance(tokens_per_expert_E: Tensor) -> dict[str, Tensor]:
    """Three views of how far a distribution of tokens over experts (last axis) is from even.

    Returns, without the last axis:
        load_max: the fullest expert's tokens over the ideal (the mean); 1 is even, E is one expert for all.
        dead_share: share of the experts without any token, in [0, 1].
        entropy: entropy over its maximum log E; 1 is even, 0 is one expert for all. With one expert, 1.

    A row without any token gives NaN.
    """
    counts_E = tokens_per_expert_E.to(torch.float64)
    num_experts = counts_E.shape[-1]
    share_E = counts_E / counts_E.sum(-1, keepdim=True)
    entropy = torch.special.entr(share_E).sum(-1)
    log_experts = torch.tensor(float(num_experts), dtype=torch.float64).log()
    return {
        "load_max": share_E.amax(-1) * num_experts,
        "dead_share": torch.where(share_E.isnan(), share_E, (counts_E == 0).double()).mean(-1),
        "entropy": entropy / log_experts if num_experts > 1 else torch.ones_like(entropy) + 0 * entropy,
    }


def expert_metrics(tokens_per_expert_LME: Tensor) -> Record:
    """Names and values of `balance` for every layer, for each modality, and as means over layers.

    `experts/load_max` is the mean over layers, `experts/load_max/layer_00` a layer, and
    `experts/load_max/image` and `experts/load_max/image/layer_00` the same for image tokens alone.
    A modality that sent no token is left out. `dead_share` and `entropy` are named alike.
    """
    views = {"": tokens_per_expert_LME.sum(1)}
    for index, modality in enumerate(MODALITIES):
        views[f"/{modality}"] = tokens_per_expert_LME[:, index]
    means: Record = {}
    layers: Record = {}
    for view, tokens_per_expert_LE in views.items():
        for name, value_L in balance(tokens_per_expert_LE).items():
            seen = {layer: value for layer, value in enumerate(value_L.tolist()) if value == value}
            if seen:
                means[f"experts/{name}{view}"] = sum(seen.values()) / len(seen)
            layers |= {f"experts/{name}{view}/layer_{layer:02d}": value for layer, value in seen.items()}
    return means | layers
