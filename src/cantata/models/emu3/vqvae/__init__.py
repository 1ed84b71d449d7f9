"""Emu3's tokenizer of images and clips."""

from cantata.models.emu3.vqvae.config import Emu3VQVAEConfig
from cantata.models.emu3.vqvae.model import Emu3VQVAE, emu3_vqvae_from_hub

__all__ = ["Emu3VQVAE", "Emu3VQVAEConfig", "emu3_vqvae_from_hub"]
