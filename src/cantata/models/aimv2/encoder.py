"""AIMv2's image encoder as a model of its own, as it is published (Fini et al., 2024, arXiv:2411.14402)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from cantata.core.types import Images
from cantata.models.aimv2.config import Aimv2VisionConfig
from cantata.models.aimv2.hf import Aimv2VisionLayout, encoder_config
from cantata.models.aimv2.vision import VisionTower


class Aimv2Encoder(nn.Module):
    """Patches to features, with a pooling head where `vision.use_head`.

    vision: shapes and settings.
    """

    def __init__(self, vision: Aimv2VisionConfig) -> None:
        super().__init__()
        self.vision_config = vision
        self.vision = VisionTower(vision)

    def forward(self, images: Images) -> Tensor:
        """Features of all patches, (P, D)."""
        features_PD: Tensor = self.vision(images)
        return features_PD

    def hub_layout(self) -> Aimv2VisionLayout:
        return Aimv2VisionLayout(self.vision_config)


def encoder_from_hub(directory: str | Path) -> Aimv2Encoder:
    """Build the encoder that a Hugging Face directory describes; its weights are not read.

    Raises `ConfigError` where the directory holds another model.
    """
    return Aimv2Encoder(encoder_config(directory))
