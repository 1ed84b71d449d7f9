"""Emu3's tokenizer: images and clips as codes (Wang et al., 2024, arXiv:2409.18869; MoVQ: arXiv:2209.09002).

B  images or clips    T  frames    C  colours    H, W  rows and columns of pixels
t, h, w  frames, rows and columns of codes    N  codes of all clips    D  values of a latent
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.models.autoencoder.parts import code_grid, fill, pyramid_units
from cantata.models.emu3.vqvae.config import Emu3VQVAEConfig
from cantata.models.emu3.vqvae.hf import COLOURS, Emu3VQVAELayout, read_hub_config
from cantata.models.emu3.vqvae.temporal import TemporalDecoder, TemporalEncoder
from cantata.models.protocol import TokenizerOutput, Unit
from cantata.nn.conv import CausalConv3d
from cantata.nn.conv_operations import decoder_operations, encoder_operations, products
from cantata.nn.moe.layer import MoELayer
from cantata.nn.quantize.vq import VectorQuantizer
from cantata.nn.resnet import Decoder, Encoder, SpatialNorm


class Emu3VQVAE(nn.Module):
    """The whole model, from pixels to codes and back.

    An image is a clip that repeats it: it is encoded once and its latents are repeated, and of its decoded
    frames only the first is computed, since no frame sees a later one.

    In training batch norms take their statistics from the batch, which changes codes: a tokenizer that a
    language model reads is in evaluation.

    shape: widths and depths.
    quantizer: plain, without normalisation; its width is `shape.z_channels`.
    weights: Hugging Face directory to start from, or null for random weights; the recipe reads it.
    """

    def __init__(
        self, shape: Emu3VQVAEConfig, quantizer: VectorQuantizer, weights: str | None = None
    ) -> None:
        super().__init__()
        _check(shape, quantizer)
        self.shape = shape
        self.weights = weights
        latent, halvings, blocks = shape.z_channels, shape.halvings, shape.num_res_blocks
        self.encoder = Encoder(shape.encoder, COLOURS, latent)
        self.temporal_encoder = TemporalEncoder(latent, halvings, blocks)
        self.quant_conv = CausalConv3d(latent, latent, (3, 1, 1), 1)
        self.quantizer = quantizer
        self.post_quant_conv = CausalConv3d(latent, latent, (3, 1, 1), 1)
        self.temporal_decoder = TemporalDecoder(latent, halvings, blocks)
        norm = partial(SpatialNorm, condition_dim=latent)
        self.decoder = Decoder(shape.decoder, latent, COLOURS, norm, patch_size=1)

    def forward(self, pixels_BTCHW: Tensor) -> TokenizerOutput:
        z_BDthw = self._latents(pixels_BTCHW)
        quantized = self.quantizer(_rows(z_BDthw))
        values_BDthw = _grid(quantized.values_ND, z_BDthw.shape)
        frames_BTCHW, last_input = self._frames(values_BDthw, first_only=pixels_BTCHW.shape[1] == 1)
        return TokenizerOutput(frames_BTCHW, quantized, last_input)

    @torch.no_grad()
    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Codes (B, t, h, w): one frame of codes of an image, or of `temporal_factor` frames of a clip."""
        z_BDthw = self._latents(pixels_BTCHW)
        indices_N: Tensor = self.quantizer(_rows(z_BDthw)).indices_N
        batch, _, frames, rows, columns = z_BDthw.shape
        return indices_N.reshape(batch, frames, rows, columns)

    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Pixels (B, T, C, H, W), not clamped; one frame of codes is an image, more are a clip."""
        return self._decode(codes_Bthw, first_only=codes_Bthw.shape[1] == 1)

    def decode_clip(self, codes_Bthw: Tensor) -> Tensor:
        """The same, where one frame of codes too is a clip of `temporal_factor` frames."""
        return self._decode(codes_Bthw, first_only=False)

    def _decode(self, codes_Bthw: Tensor, *, first_only: bool) -> Tensor:
        batch, *grid = codes_Bthw.shape
        values_ND = self.quantizer.decode(codes_Bthw.flatten())
        values_BDthw = _grid(values_ND, torch.Size((batch, self.quantizer.dim, *grid)))
        return self._frames(values_BDthw, first_only=first_only)[0]

    def _latents(self, pixels_BTCHW: Tensor) -> Tensor:
        batch, frames, _, height, width = pixels_BTCHW.shape
        self.grid(frames, height, width)
        x_NDhw = self.encoder(pixels_BTCHW.flatten(0, 1))
        x_BDThw = x_NDhw.reshape(batch, frames, *x_NDhw.shape[1:]).transpose(1, 2)
        if frames == 1:
            x_BDThw = x_BDThw.expand(-1, -1, self.shape.temporal_factor, -1, -1)
        z_BDthw: Tensor = self.quant_conv(self.temporal_encoder(x_BDThw))
        return z_BDthw

    def _frames(self, values_BDthw: Tensor, *, first_only: bool) -> tuple[Tensor, Tensor]:
        latents_BDthw = self.post_quant_conv(values_BDthw)
        # What conditions the norms goes the latents' way through time, by the same weights and statistics.
        both = torch.cat((latents_BDthw, values_BDthw.to(latents_BDthw.dtype)))
        both = self.temporal_decoder(both, first_only=first_only)
        latents_NDhw, condition_NDhw = both.transpose(1, 2).flatten(0, 1).chunk(2)
        frames_NCHW, last_input = self.decoder(latents_NDhw, condition_NDhw)
        return frames_NCHW.reshape(len(values_BDthw), -1, *frames_NCHW.shape[1:]), last_input

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w); `ConfigError` for frames or sides that are no multiple of what a code stands for."""
        if frames != 1 and (frames % self.shape.temporal_factor or not frames):
            raise ConfigError(
                f"a clip of {frames} frames: the tokenizer takes one frame or a multiple of "
                f"{self.shape.temporal_factor}; sample another number of frames"
            )
        return -(-frames // self.shape.temporal_factor), *code_grid(self.shape.factor, height, width)

    @property
    def last_layer(self) -> nn.Module:
        return self.decoder.head.conv

    def units(self) -> Sequence[Unit]:
        """The stages of encoder and decoder, and what stands between them.

        What holds batch norms is no block: recomputation would move their running statistics twice.
        """
        return [
            *pyramid_units("encoder", self.encoder),
            Unit("temporal_encoder", self.temporal_encoder, False),
            Unit("quant_conv", self.quant_conv, False),
            Unit("quantizer", self.quantizer, False, in_fp32=True),
            Unit("post_quant_conv", self.post_quant_conv, False),
            Unit("temporal_decoder", self.temporal_decoder, False),
            *pyramid_units("decoder", self.decoder),
        ]

    def moe_layers(self) -> Sequence[MoELayer]:
        return ()

    @property
    def balance(self) -> None:
        return None

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """See `autoencoder.parts.fill`; the quantiser fills its own."""
        owner, _, rest = name.partition(".")
        if owner == "quantizer":
            self.quantizer.init_parameter(rest, tensor, generator)
        else:
            fill(self, name, tensor, generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """Three times a forward's convolutions and attention, a code of an image; see `nn.conv_operations`.

        `mean_sample_length` is the codes of an image, over which attention runs. A code of a clip takes up to
        `temporal_factor` times as much. The search of codes is left out.
        """
        total = encoder_operations(self.encoder, mean_sample_length)
        total += decoder_operations(self.decoder, mean_sample_length)
        frames = float(self.shape.temporal_factor)
        for down in self.temporal_encoder.downs:
            frames /= 2
            total += products(down, frames)
        # Of one frame a causal convolution computes one tap of three; the decoder's run on the condition too.
        for part, rows in (
            (self.temporal_encoder.blocks, 1),
            (self.quant_conv, 1),
            (self.post_quant_conv, 1),
            (self.temporal_decoder, 2),
        ):
            total += products(part, rows / 3)
        return 3.0 * total

    def hub_layout(self) -> Emu3VQVAELayout:
        return Emu3VQVAELayout(self.shape, self.quantizer.num_codes)


def emu3_vqvae_from_hub(directory: str | Path) -> Emu3VQVAE:
    """Build the model that a Hugging Face directory describes; its weights are not read."""
    shape, num_codes = read_hub_config(directory)
    # A published config does not say how it was trained; 0.25 is van den Oord et al.'s (arXiv:1711.00937).
    quantizer = VectorQuantizer(num_codes, shape.z_channels, 0.25, False, "straight_through")
    return Emu3VQVAE(shape, quantizer, weights=str(directory))


def _check(shape: Emu3VQVAEConfig, quantizer: VectorQuantizer) -> None:
    if not isinstance(quantizer, VectorQuantizer) or quantizer.l2_normalize:
        raise ConfigError(
            "model.quantizer: Emu3's codes are cantata.nn.quantize.VectorQuantizer's with l2_normalize="
            "false; for other quantisers choose another model, for example model=vqgan_f8"
        )
    if quantizer.dim != shape.z_channels:
        raise ConfigError(
            f"model.quantizer.dim is {quantizer.dim}; it must be model.shape.z_channels ({shape.z_channels})"
        )


def _rows(z_BDthw: Tensor) -> Tensor:
    return z_BDthw.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _grid(values_ND: Tensor, shape: torch.Size) -> Tensor:
    batch, dim, *grid = shape
    return values_ND.reshape(batch, *grid, dim).permute(0, 4, 1, 2, 3)
