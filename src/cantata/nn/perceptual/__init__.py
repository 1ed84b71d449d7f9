"""How different two images look, by the features of a frozen network."""

from cantata.nn.perceptual.base import Perceptual

__all__ = ["Perceptual"]
