"""Autoencoders of a few thousand parameters, and a quantiser that needs no search to speak of."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from cantata.models.autoencoder import Autoencoder, AutoencoderConfig
from cantata.nn.conv import Upsample
from cantata.nn.quantize.base import Quantized, Quantizer, usage

SHAPE = AutoencoderConfig(
    encoder_channels=8,
    decoder_channels=12,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    decoder_res_blocks=2,
    middle=True,
    direct_resampling=False,
    attention_levels=(2,),
    patch_size=1,
    z_channels=6,
)

COMPACT = replace(SHAPE, decoder_res_blocks=1, middle=False, direct_resampling=True, attention_levels=())
"""With nothing in the middle, and widths that change between the levels."""


class Nearest(Quantizer):
    """Plain vector quantisation with the straight-through gradient, written out."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        self.codebook_KD = nn.Parameter(torch.empty(num_codes, dim))

    def forward(self, z_ND: Tensor) -> Quantized:
        rows_ND = z_ND.float()
        indices_N = torch.cdist(rows_ND, self.codebook_KD).argmin(1)
        chosen_ND = self.codebook_KD[indices_N]
        loss = (chosen_ND - rows_ND).square().mean(1).sum()
        values_ND = rows_ND + (chosen_ND - rows_ND).detach()
        counts_K = usage(indices_N, self.num_codes)
        return Quantized(values_ND.to(z_ND.dtype), indices_N, loss, {"vq": loss.detach()}, counts_K, {})

    def decode(self, indices_N: Tensor) -> Tensor:
        return self.codebook_KD[indices_N]

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        assert name == "codebook_KD"
        tensor.normal_(generator=generator)


def filled(model: nn.Module, seed: int = 0, perturb: bool = True) -> nn.Module:
    """Initialised from the seed; `perturb` moves what begins at 1 or 0 off it, so that tests see it."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            model.init_parameter(name, tensor, generator)  # type: ignore[operator]
            if perturb and (tensor.dim() == 1 or (tensor.dim() > 1 and not tensor.any())):
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator).abs()
    return model


def small_autoencoder(seed: int = 0, shape: AutoencoderConfig = SHAPE) -> Autoencoder:
    model = filled(Autoencoder(shape, Nearest(32, 4)), seed)
    assert isinstance(model, Autoencoder)
    return model


def kernel_sums(model: nn.Module) -> int:
    """Operations of a forward that make upsampling kernels of 16 taps out of 9, whatever the images."""
    upsampling = [part for part in model.modules() if isinstance(part, Upsample)]
    return sum(2 * 16 * part.conv.weight.numel() for part in upsampling)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Smooth random pictures from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    batch, frames, channels, height, width = shape
    coarse = torch.randn(batch * frames, channels, height // 4, width // 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.tanh().reshape(shape)
