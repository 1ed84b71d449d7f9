"""Aria: vision tower, projector and mixture-of-experts decoder."""

from cantata.models.aria.config import AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.models.aria.model import Aria, aria_from_hub
from cantata.models.aria.processor import AriaProcessor, TruePositionProcessor

__all__ = [
    "Aria",
    "AriaMoEConfig",
    "AriaProcessor",
    "AriaProjectorConfig",
    "AriaTextConfig",
    "AriaVisionConfig",
    "TruePositionProcessor",
    "aria_from_hub",
]
