"""AIMv2's encoder as the vision tower of another model."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError
from cantata.models.aimv2.config import Aimv2VisionConfig
from cantata.models.aimv2.hf import Aimv2VisionLayout, encoder_config
from cantata.models.aimv2.vision import VisionTower
from cantata.models.protocol import HubPart


@dataclass(frozen=True)
class Aimv2Tower(Aimv2VisionConfig):
    """Settings of the encoder, and where its weights are: what `model.vision` of Aria may be."""

    weights: str | None
    """Folder of a published encoder to start from; null: random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_head:
            raise ConfigError("model.vision.use_head=true: a tower gives features of patches, not of images")

    @property
    def true_positions(self) -> bool:
        """Native positions are computed from rows and columns."""
        return self.is_native

    def build(self) -> VisionTower:
        """The encoder."""
        return VisionTower(self)

    def part(self, names: frozenset[str]) -> HubPart | None:
        """The encoder's folder; raises `ConfigError` where it holds another model."""
        if self.weights is None:
            return None
        encoder_config(self.weights)
        return HubPart(names, self.weights, Aimv2VisionLayout(self))
