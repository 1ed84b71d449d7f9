"""LPIPS, the perceptual distance of Zhang et al. 2018 (arXiv:1801.03924), with VGG16's features.

B  images    C  channels    H, W  rows and columns
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.nn.perceptual.base import unit_distance
from cantata.nn.perceptual.weights import Weights

LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions of each level, numbered as in torchvision's `vgg16.features`; levels are pooled between."""
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What LPIPS takes from pixels between -1 and 1, and divides by, by colour."""


class LPIPS:
    """The sum over VGG16's five levels of weighted squared differences of positions' unit features.

    vgg16: torchvision's state dict (`features.<n>.weight` and `.bias`).
    linear: LPIPS' own weights (`lin<n>.model.1.weight`, its `v0.1/vgg.pth`), or the same file again.

    Raises:
        ConfigError: a file is not there, or tensors are missing.
    """

    name = "lpips"
    features_name = "vgg16"

    def __init__(self, vgg16: Path, linear: Path) -> None:
        tensors = Weights([vgg16, linear])
        before = 3
        self._levels: list[list[tuple[Tensor, Tensor]]] = []
        for numbers, width in zip(LEVELS, WIDTHS, strict=True):
            level = []
            for number in numbers:
                weight = tensors.take(f"features.{number}.weight", width, before, 3, 3)
                level.append((weight, tensors.take(f"features.{number}.bias", width)))
                before = width
            self._levels.append(level)
        self._linear = [
            tensors.take(f"lin{index}.model.1.weight", 1, width, 1, 1).flatten()
            for index, width in enumerate(WIDTHS)
        ]
        tensors.check()
        self._shift, self._scale = torch.tensor(SHIFT), torch.tensor(SCALE)

    def to(self, device: torch.device) -> LPIPS:
        """Move to a device, in place."""
        self._levels = [[(w.to(device), b.to(device)) for w, b in level] for level in self._levels]
        self._linear = [weight.to(device) for weight in self._linear]
        self._shift, self._scale = self._shift.to(device), self._scale.to(device)
        return self

    def distance(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """See `Perceptual`."""
        with torch.no_grad():
            x = self._maps(x_BCHW)
        return torch.stack(unit_distance(x, self._maps(y_BCHW), self._linear)).sum(0)

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """See `Perceptual`; the means of the last level's 512 channels."""
        return self._maps(x_BCHW)[-1].mean((2, 3))

    def _maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """The output of each level; images of fewer than 16 pixels a side have none of the last."""
        x_BCHW = (x_BCHW.float() - self._shift[:, None, None]) / self._scale[:, None, None]
        maps: list[Tensor] = []
        for level in self._levels:
            if maps:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            for weight, bias in level:
                x_BCHW = F.relu(F.conv2d(x_BCHW, weight, bias, padding=1))
            maps.append(x_BCHW)
        return maps
