"""What the convolutional tokenizers have in common: units, initial values, sizes."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.models.protocol import Unit
from cantata.nn.resnet import Decoder, Encoder


def pyramid_units(name: str, pyramid: Encoder | Decoder) -> list[Unit]:
    """The parts of an encoder or decoder, in the order in which they run."""
    conv_in = Unit(f"{name}.conv_in", pyramid.conv_in, False)
    middle = [] if pyramid.middle is None else [Unit(f"{name}.middle", pyramid.middle, True)]
    stages = [Unit(f"{name}.stages.{i}", stage, True) for i, stage in enumerate(pyramid.stages)]
    head = Unit(f"{name}.head", pyramid.head, False)
    if isinstance(pyramid, Encoder):
        return [conv_in, *stages, *middle, head]
    unfold = [] if pyramid.unfold is None else [Unit(f"{name}.unfold", pyramid.unfold, False)]
    return [conv_in, *middle, *stages, *unfold, head]


def fill(model: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a parameter with its initial value: norms 1 and 0, weights up to sqrt(3 / fan-in), biases 0.

    So a layer keeps the variance of what it reads (LeCun et al., 1998, "Efficient BackProp"). Residual blocks
    begin as what they are added to: their last convolution is 0 (Goyal et al., 2017, arXiv:1706.02677). Where
    a latent scales and shifts a norm, both begin near 1 and 0: their biases are that, their weights uniform.
    """
    parent, _, leaf = name.rpartition(".")
    owner = parent.rpartition(".")[2]
    with torch.no_grad():
        if "norm" in owner:
            tensor.fill_(1.0 if leaf in ("weight", "running_var") else 0.0)
            return
        if owner in ("scale", "shift") and leaf == "bias":
            tensor.fill_(1.0 if owner == "scale" else 0.0)
            return
        if leaf == "bias" or owner == "conv2":
            tensor.zero_()
            return
        bound = sqrt(3.0 / tensor[0].numel())
        tensor.uniform_(-bound, bound, generator=generator)


def code_grid(factor: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of codes; `ConfigError` for sides that are no multiple of the factor."""
    if height % factor or width % factor or not height or not width:
        raise ConfigError(
            f"images of {width} x {height} pixels: both sides must be multiples of {factor}, the pixels that "
            "a code stands for; crop or resize them"
        )
    return height // factor, width // factor
