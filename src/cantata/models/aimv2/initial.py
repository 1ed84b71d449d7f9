"""Initial values that the models of this family share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOGIT_SCALE = math.log(1 / 0.07)
"""Initial logarithm of the contrastive model's scale, CLIP's."""


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator, std: float) -> None:
    """Norms 1, biases 0, the scale CLIP's, the rest normal."""
    with torch.no_grad():
        if name == "logit_scale":
            tensor.fill_(LOGIT_SCALE)
        elif name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name.split(".")[-2]:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, std, generator=generator)
