"""Emu3: a language model that reads and writes images and clips as tokens."""

from cantata.models.emu3.config import Emu3TextConfig, Emu3Tokens
from cantata.models.emu3.model import Emu3, emu3_from_hub
from cantata.models.emu3.processor import Emu3Processor

__all__ = ["Emu3", "Emu3Processor", "Emu3TextConfig", "Emu3Tokens", "emu3_from_hub"]
