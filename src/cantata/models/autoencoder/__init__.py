"""A convolutional autoencoder of images with any quantiser in its middle."""

from cantata.models.autoencoder.config import AutoencoderConfig
from cantata.models.autoencoder.model import Autoencoder, autoencoder_from_hub

__all__ = ["Autoencoder", "AutoencoderConfig", "autoencoder_from_hub"]
