"""A convolutional autoencoder of images with discrete latents (VQGAN: Esser et al., 2020, arXiv:2012.09841).

The shape is LlamaGen's tokenizer's (Sun et al., 2024, arXiv:2406.06525).

B  images    C  colours    H, W  rows and columns of pixels    h, w  of codes
N  codes of all images    D  values of a quantised row
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.models.autoencoder.config import AutoencoderConfig
from cantata.models.autoencoder.hf import AutoencoderLayout, read_hub_config
from cantata.models.autoencoder.parts import code_grid, fill, pyramid_units
from cantata.models.protocol import TokenizerOutput, Unit
from cantata.nn.conv import Conv2d
from cantata.nn.conv_operations import decoder_operations, encoder_operations, products
from cantata.nn.moe.layer import MoELayer
from cantata.nn.quantize.base import Quantizer
from cantata.nn.resnet import Decoder, Encoder, GroupNorm

COLOURS = 3
NORM = partial(GroupNorm, least=4)
"""As published where levels have 128 channels or more."""


class Autoencoder(nn.Module):
    """The whole model, from pixels to codes and back.

    shape: widths and depths of encoder and decoder.
    quantizer: what stands in the middle.
    weights: a folder that `cantata export` wrote, to start from, or null for random weights.
    """

    def __init__(self, shape: AutoencoderConfig, quantizer: Quantizer, weights: str | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.weights = weights
        self.encoder = Encoder(shape.encoder, COLOURS * shape.patch_size**2, shape.z_channels, NORM)
        self.quant_conv = Conv2d(shape.z_channels, quantizer.dim, 1)
        self.quantizer = quantizer
        self.post_quant_conv = Conv2d(quantizer.dim, shape.z_channels, 1)
        self.decoder = Decoder(shape.decoder, shape.z_channels, COLOURS, NORM, shape.patch_size)

    def forward(self, pixels_BTCHW: Tensor) -> TokenizerOutput:
        z_BDhw = self._latents(pixels_BTCHW)
        quantized = self.quantizer(_rows(z_BDhw))
        images_BCHW, last_input = self._images(quantized.values_ND, z_BDhw.shape)
        # A copy: FSDP warns of every step that gives out a view.
        return TokenizerOutput(images_BCHW.unsqueeze(1).clone(), quantized, last_input)

    @torch.no_grad()
    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Codes (B, 1, h, w), or (B, 1, h, w, R) of a residual quantiser."""
        z_BDhw = self._latents(pixels_BTCHW)
        codes: Tensor = self.quantizer(_rows(z_BDhw)).indices_N
        return codes.reshape(len(z_BDhw), 1, *z_BDhw.shape[2:], *codes.shape[1:])

    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Pixels (B, 1, C, H, W), not clamped."""
        batch, _, rows, columns = codes_Bthw.shape[:4]
        values_ND = self.quantizer.decode(codes_Bthw.flatten(0, 3))
        shape = torch.Size((batch, self.quantizer.dim, rows, columns))
        return self._images(values_ND, shape)[0].unsqueeze(1)

    def _latents(self, pixels_BTCHW: Tensor) -> Tensor:
        _, frames, _, height, width = pixels_BTCHW.shape
        self.grid(frames, height, width)
        patches_BCHW = F.pixel_unshuffle(pixels_BTCHW.squeeze(1), self.shape.patch_size)
        z_BDhw: Tensor = self.quant_conv(self.encoder(patches_BCHW))
        return z_BDhw

    def _images(self, values_ND: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        batch, _, rows, columns = shape
        values_BDhw = values_ND.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)
        images_BCHW, last_input = self.decoder(self.post_quant_conv(values_BDhw), None)
        return images_BCHW, last_input

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(1, h, w) of an image; `ConfigError` for clips and for sides that are no multiple of the factor."""
        if frames != 1:
            raise ConfigError(
                f"a clip of {frames} frames: model {type(self).__name__} takes images only; cut clips into "
                "frames or choose a video tokenizer, for example model=emu3_vqvae"
            )
        return 1, *code_grid(self.shape.factor, height, width)

    @property
    def last_layer(self) -> nn.Module:
        return self.decoder.head.conv

    def units(self) -> Sequence[Unit]:
        """The stages of encoder and decoder, and what stands between them."""
        return [
            *pyramid_units("encoder", self.encoder),
            Unit("quant_conv", self.quant_conv, False),
            Unit("quantizer", self.quantizer, False, in_fp32=True),
            Unit("post_quant_conv", self.post_quant_conv, False),
            *pyramid_units("decoder", self.decoder),
        ]

    def moe_layers(self) -> Sequence[MoELayer]:
        return ()

    @property
    def balance(self) -> None:
        return None

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """See `parts.fill`; the quantiser fills its own."""
        owner, _, rest = name.partition(".")
        if owner == "quantizer":
            self.quantizer.init_parameter(rest, tensor, generator)
        else:
            fill(self, name, tensor, generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """Three times a forward's convolutions and attention, a code; see `nn.conv_operations`.

        `mean_sample_length` is the codes of an image, over which attention runs. The search of codes is left
        out, since quantisers differ in it.
        """
        convs = products(self.quant_conv, 1.0) + products(self.post_quant_conv, 1.0)
        encoder = encoder_operations(self.encoder, mean_sample_length)
        return 3.0 * (encoder + convs + decoder_operations(self.decoder, mean_sample_length))

    def hub_layout(self) -> AutoencoderLayout:
        return AutoencoderLayout(self.shape, self.quantizer)


def autoencoder_from_hub(directory: str | Path) -> Autoencoder:
    """Build the model that an exported folder describes; its weights are not read."""
    return Autoencoder(*read_hub_config(directory), weights=str(directory))


def _rows(z_BDhw: Tensor) -> Tensor:
    return z_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
