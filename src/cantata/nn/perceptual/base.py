"""What every feature distance is, and how features are compared.

B  images    C  channels    H, W  rows and columns    F  pooled features
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Perceptual(Protocol):
    """A frozen network that judges images, in fp32; it is part of no engine and no checkpoint."""

    name: str
    """Of the distance, in metrics."""
    features_name: str
    """Of the pooled features, in metrics."""

    def to(self, device: torch.device) -> Perceptual:
        """Move to a device, in place."""
        ...

    def distance(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """How far each y is from its x, (B,), with gradient to y alone; values from -1 to 1."""
        ...

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, F) of images with values from -1 to 1, without gradient."""
        ...


def unit(x_BCHW: Tensor) -> Tensor:
    """Each position's channels scaled to length 1."""
    # The root's gradient is infinite at 0, where ReLU networks put whole positions.
    length_B1HW = x_BCHW.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt()
    return x_BCHW / (length_B1HW + 1e-10)


def unit_distance(x: Iterable[Tensor], y: Iterable[Tensor], weights: Iterable[Tensor | None]) -> list[Tensor]:
    """For each pair of feature maps (B, C, H, W): the squared difference of their unit channels, (B,).

    Summed over channels, times each channel's weight (C,) where there is one, and averaged over positions.
    """
    distances = []
    for a_BCHW, b_BCHW, weight_C in zip(x, y, weights, strict=True):
        square_BCHW = (unit(a_BCHW) - unit(b_BCHW)).square()
        if weight_C is not None:
            square_BCHW = square_BCHW * weight_C[:, None, None]
        distances.append(square_BCHW.sum(1).mean((1, 2)))
    return distances
