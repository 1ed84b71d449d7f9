"""AIMv2: an image encoder, its pretraining on patches and text, and its contrastive model."""

from cantata.models.aimv2.config import Aimv2DecoderConfig, Aimv2TextConfig, Aimv2VisionConfig
from cantata.models.aimv2.contrastive import Aimv2Contrastive, contrastive_from_hub
from cantata.models.aimv2.encoder import Aimv2Encoder, encoder_from_hub
from cantata.models.aimv2.pretraining import Aimv2Pretraining
from cantata.models.aimv2.processor import Aimv2PairProcessor, Aimv2Processor
from cantata.models.aimv2.tower import Aimv2Tower

__all__ = [
    "Aimv2Contrastive",
    "Aimv2DecoderConfig",
    "Aimv2Encoder",
    "Aimv2PairProcessor",
    "Aimv2Pretraining",
    "Aimv2Processor",
    "Aimv2TextConfig",
    "Aimv2Tower",
    "Aimv2VisionConfig",
    "contrastive_from_hub",
    "encoder_from_hub",
]
