"""A critic of patches: convolutions that judge each part of an image or clip on its own.

B  images or clips    T  frames    C  channels    H, W  rows and columns    P  patches
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.errors import ConfigError

SLOPE = 0.2
"""Of LeakyReLU below 0."""
WIDEST = 8
"""No level has more channels than this times the first's."""
DEVIATION = 0.02
"""Of the initial weights, as in pix2pix."""


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2016, arXiv:1611.07004, as in Esser et al. 2020, arXiv:2012.09841).

    `layers` convolutions of 4 x 4 and stride 2, one more of stride 1 and one to a single channel, with
    normalisation and LeakyReLU between them. GroupNorm stands where they have BatchNorm, so that what an
    image is told depends neither on the others of its batch nor on the number of ranks, and training is
    evaluation.

    Args:
        dims: 2 judges every frame alone, 3 looks along time too, by kernels of 3 frames; both take images.
        in_channels: of a pixel.
        base_channels: of the first level; each next one has twice as many, up to 8 times.
        layers: levels of stride 2; 3 see patches of 70 x 70 pixels.
        norm_groups: of GroupNorm; it must divide the channels of all levels but the first.

    Raises:
        ConfigError: a number that makes no network.
    """

    def __init__(
        self, dims: int, in_channels: int, base_channels: int, layers: int, norm_groups: int
    ) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise ConfigError(f"critic.discriminator.dims={dims} must be 2 (frames) or 3 (clips)")
        numbers = {"in_channels": in_channels, "base_channels": base_channels, "layers": layers}
        for name, value in {**numbers, "norm_groups": norm_groups}.items():
            if value < 1:
                raise ConfigError(f"critic.discriminator.{name}={value} must be at least 1")
        self.dims = dims
        self.layers = layers
        widths = [base_channels * min(2**level, WIDEST) for level in range(layers + 1)]
        for width in widths[1:]:
            if width % norm_groups:
                raise ConfigError(
                    f"critic.discriminator.norm_groups={norm_groups} must divide the channels of every level "
                    f"but the first: {', '.join(map(str, widths[1:]))}"
                )
        self.convs = nn.ModuleList()
        before = in_channels
        for level, width in enumerate(widths):
            self.convs.append(self._conv(before, width, stride=2 if level < layers else 1))
            before = width
        self.convs.append(self._conv(before, 1, stride=1))
        self.norms = nn.ModuleList(nn.GroupNorm(norm_groups, width) for width in widths[1:])

    def forward(self, pixels_BTCHW: Tensor) -> Tensor:
        """Logits of every patch, (B, P), higher for what looks real; pixels go from -1 to 1.

        Raises `ConfigError` for images too small for so many layers.
        """
        batch, _, _, *sides = pixels_BTCHW.shape
        if min(sides) >> self.layers < 3:
            raise ConfigError(
                f"critic.discriminator.layers={self.layers} needs images of at least {3 << self.layers} "
                f"pixels a side, not {min(sides)}"
            )
        x = pixels_BTCHW.transpose(1, 2) if self.dims == 3 else pixels_BTCHW.flatten(0, 1)
        x = F.leaky_relu(self.convs[0](x), SLOPE)
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        logits: Tensor = self.convs[-1](x)
        return logits.reshape(batch, -1)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Weights around 0, those of norms around 1; biases 0."""
        if name.endswith("bias"):
            tensor.zero_()
        else:
            mean = 1.0 if name.startswith("norms.") else 0.0
            tensor.normal_(mean, DEVIATION, generator=generator)

    def _conv(self, before: int, after: int, stride: int) -> nn.Conv2d | nn.Conv3d:
        if self.dims == 2:
            return nn.Conv2d(before, after, 4, stride=stride, padding=1)
        return nn.Conv3d(before, after, (3, 4, 4), stride=stride, padding=1)
