"""Mllama: Llama 3.2 Vision, whose text reads images through cross attention."""

from cantata.models.mllama.config import Masking, MllamaTextConfig, MllamaVisionConfig
from cantata.models.mllama.model import Mllama, mllama_from_hub
from cantata.models.mllama.processor import MllamaProcessor

__all__ = [
    "Masking",
    "Mllama",
    "MllamaProcessor",
    "MllamaTextConfig",
    "MllamaVisionConfig",
    "mllama_from_hub",
]
