"""Inception's pooled features, whose Frechet distance is FID (Heusel et al. 2017, arXiv:1706.08500).

B  images    C  channels    H, W  rows and columns    F  pooled features
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.nn.perceptual.weights import Weights

FEATURES = "2048"
"""The layer that FID is taken of, as torch-fidelity names it."""


class Inception:
    """TensorFlow's Inception of 2015 as torch-fidelity rebuilt it, with a file of its weights.

    weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        ConfigError: torch-fidelity is not there, or the file holds other tensors.
    """

    def __init__(self, weights: Path) -> None:
        # The library would run whatever a pickle says; this reads tensors alone, or refuses.
        Weights([weights])
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ConfigError(
                f"inception={weights} needs torch-fidelity and torchvision ({error}): pip install "
                "torch-fidelity, or set inception=null"
            ) from error
        try:
            self._network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(weights)
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"inception={weights} is no weights of Inception: {reason}") from error

    def to(self, device: torch.device) -> Inception:
        """Move to a device, in place."""
        self._network.to(device)
        return self

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Pooled features (B, F) of images of whole values from 0 to 255, in any dtype."""
        features_BF: Tensor = self._network(x_BCHW.to(torch.uint8))[0]
        return features_BF
