"""A tokenizer small enough to write out, and batches of images and clips for it.

It quantises to the nearest of a few fixed rows, follows `models.protocol`, and ends in a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cantata.core.types import PixelBatch, StepTotals
from cantata.models.protocol import TokenizerOutput, Unit
from cantata.nn.quantize.base import Quantized, usage

CODES, WIDTH, SIDE = 5, 4, 8
COMMITMENT = 0.25


class Codebook(nn.Module):
    num_codes = CODES

    def __init__(self) -> None:
        super().__init__()
        self.rows_KD = nn.Parameter(torch.empty(CODES, WIDTH))

    def forward(self, z_ND: Tensor) -> Quantized:
        z32_ND = z_ND.float()
        rows_KD = self.rows_KD.float()
        index_N = torch.cdist(z32_ND, rows_KD).argmin(1)
        chosen_ND = rows_KD[index_N]
        codebook = (chosen_ND - z32_ND.detach()).square().sum()
        commitment = (chosen_ND.detach() - z32_ND).square().sum()
        return Quantized(
            values_ND=(z32_ND + (chosen_ND - z32_ND).detach()).to(z_ND.dtype),
            indices_N=index_N,
            loss_sum=codebook + COMMITMENT * commitment,
            parts={"codebook": codebook.detach(), "commitment": commitment.detach()},
            usage_K=usage(index_N, CODES),
            statistics={"rows_KD": torch.zeros(CODES, WIDTH).index_add(0, index_N, z32_ND.detach())},
        )


class Tokenizer(nn.Module):
    """Pixels to a quarter as many positions and back, frame by frame."""

    balance = None

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.quantizer = Codebook()
        self.up = nn.Conv2d(WIDTH, WIDTH * 4, 1)
        self.last = nn.Conv2d(WIDTH, 3, 3, padding=1) if dims == 2 else nn.Conv3d(WIDTH, 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Module:
        return self.last

    def forward(self, pixels_BTCHW: Tensor) -> TokenizerOutput:
        frames = pixels_BTCHW.shape[:2]
        z_FDhw = self.encoder(pixels_BTCHW.flatten(0, 1).to(self.encoder.weight.dtype))
        quantized = self.quantizer(z_FDhw.movedim(1, -1).flatten(0, -2))
        shape = (z_FDhw.shape[0], *z_FDhw.shape[2:], WIDTH)
        x_FDhw = self.up(quantized.values_ND.view(shape).movedim(-1, 1))
        x_FDHW = torch.tanh(nn.functional.pixel_shuffle(x_FDhw, 2))
        if isinstance(self.last, nn.Conv3d):
            last_input = x_FDHW.unflatten(0, frames).transpose(1, 2)
            reconstruction = self.last(last_input).transpose(1, 2)
        else:
            last_input = x_FDHW
            reconstruction = self.last(last_input).unflatten(0, frames)
        return TokenizerOutput(reconstruction, quantized, last_input)

    def units(self) -> Sequence[Unit]:
        names = ("encoder", "quantizer", "up", "last")
        return [Unit(name, getattr(self, name), is_block=False) for name in names]

    def moe_layers(self) -> Sequence[nn.Module]:
        return []

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(std=0.3, generator=generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        return 0.0


def tokenizer(dims: int = 2, seed: int = 0) -> Tokenizer:
    """One with values, in a single process."""
    model = Tokenizer(dims)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            model.init_parameter(name, parameter, generator)
    return model


def images(count: int, seed: int = 0, frames: int = 1, fillers: int = 0, side: int = SIDE) -> PixelBatch:
    """Random pixels; the last `fillers` of them only fill up."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count + fillers, frames, 3, side, side)
    return PixelBatch(
        pixels_BTCHW=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        is_real_B=torch.arange(count + fillers) < count,
        keys=tuple(f"random:{seed}-{index}" for index in range(count)),
        codes_per_image=frames * (side // 2) ** 2,
    )


def joined(batches: Sequence[PixelBatch]) -> PixelBatch:
    """One micro-batch of all images."""
    return PixelBatch(
        pixels_BTCHW=torch.cat([batch.pixels_BTCHW for batch in batches]),
        is_real_B=torch.cat([batch.is_real_B for batch in batches]),
        keys=tuple(key for batch in batches for key in batch.keys),
        codes_per_image=batches[0].codes_per_image,
    )


def totals_of(batches: Sequence[PixelBatch]) -> StepTotals:
    """The totals of a step made of these micro-batches."""
    sums = [(batch.num_tokens, batch.num_targets, batch.target_weight) for batch in batches]
    return StepTotals(*map(sum, zip(*sums, strict=True)))
