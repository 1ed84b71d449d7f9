"""Residual blocks of convolutional autoencoders, and the pyramids built of them.

N  images or frames    C  channels    H, W  rows and columns    h, w  the same at the coarsest level
D  values of a latent that conditions norms
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.nn.conv import Conv2d, Downsample, Upsample

MAX_GROUPS = 32
EPS = 1e-6


class GroupNorm(nn.Module):
    """Norm of 32 groups of channels, or fewer that divide them (Wu and He, 2018, arXiv:1803.08494).

    least: channels of a group, where there are as many. A group of one loses its channel's mean over the
    image, and narrow models learn the worse for it.
    """

    def __init__(self, channels: int, least: int = 1) -> None:
        super().__init__()
        self.groups = gcd(max(1, channels // least), MAX_GROUPS)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None, *, swish: bool) -> Tensor:
        """The normalised images, times their own sigmoid if `swish`; the condition is not read."""
        y_NCHW = F.group_norm(x_NCHW, self.groups, self.weight, self.bias, EPS)
        return F.silu(y_NCHW) if swish else y_NCHW


class SpatialNorm(nn.Module):
    """Group normalisation that a latent scales and shifts (MoVQ: Zheng et al., 2022, arXiv:2209.09002).

    `norm(x) * scale(z) + shift(z)`, where both are linear in the latent of the position's cell. They are
    computed once a cell and not once a pixel.
    """

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.scale = nn.Linear(condition_dim, channels)
        self.shift = nn.Linear(condition_dim, channels)

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None, *, swish: bool) -> Tensor:
        """The normalised images, times their own sigmoid if `swish`."""
        assert condition_NDhw is not None
        cells_NDhw = condition_NDhw.to(self.scale.weight.dtype)
        batch, channels, height, width = x_NCHW.shape
        rows, columns = condition_NDhw.shape[2:]
        # Repeated along a row only: what a cell's rows share is broadcast over them.
        scale_NCh1W, shift_NCh1W = (
            F.conv2d(cells_NDhw, part.weight[:, :, None, None], part.bias)
            .repeat_interleave(width // columns, 3)
            .unsqueeze(3)
            for part in (self.scale, self.shift)
        )
        y_NCHW = self.norm(x_NCHW, None, swish=False)
        y_NChHW = y_NCHW.view(batch, channels, rows, height // rows, width)
        y_NCHW = torch.addcmul(shift_NCh1W, y_NChHW, scale_NCh1W).view_as(x_NCHW)
        return F.silu(y_NCHW) if swish else y_NCHW


MakeNorm = Callable[[int], nn.Module]
"""A norm of so many channels; called with (x_NCHW, condition_NDhw, swish=...)."""


class ResnetBlock(nn.Module):
    """Norm, swish and convolution, twice; plus the input, by a 1 x 1 convolution where channels change."""

    def __init__(self, in_channels: int, out_channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3)
        self.norm2 = make_norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3)
        self.shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None) -> Tensor:
        y_NCHW: Tensor = self.conv1(self.norm1(x_NCHW, condition_NDhw, swish=True))
        y_NCHW = self.conv2(self.norm2(y_NCHW, condition_NDhw, swish=True))
        residual_NCHW: Tensor = x_NCHW if self.shortcut is None else self.shortcut(x_NCHW)
        return residual_NCHW + y_NCHW


class SpatialAttention(nn.Module):
    """One head of attention over all positions of an image, beside its input."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm = make_norm(channels)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None) -> Tensor:
        y_NCHW = self.norm(x_NCHW, condition_NDhw, swish=False)
        rows_N1LC = y_NCHW.flatten(2).transpose(1, 2).unsqueeze(1)
        mixed_N1LC = F.scaled_dot_product_attention(
            self.q_proj(rows_N1LC), self.k_proj(rows_N1LC), self.v_proj(rows_N1LC)
        )
        out_NLC: Tensor = self.out_proj(mixed_N1LC).squeeze(1)
        return x_NCHW + out_NLC.transpose(1, 2).reshape(x_NCHW.shape)


class Stage(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked; then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        make_norm: MakeNorm,
        *,
        attends: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(
            ResnetBlock(before, after, make_norm) for before, after in pairwise(widths)
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(out_channels, make_norm) for _ in range(num_blocks if attends else 0)
        )
        self.resample = resample

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x_NCHW = block(x_NCHW, condition_NDhw)
            if self.attentions:
                x_NCHW = self.attentions[i](x_NCHW, condition_NDhw)
        return x_NCHW if self.resample is None else self.resample(x_NCHW)


class Middle(nn.Module):
    """A residual block, attention, a residual block, at the coarsest resolution."""

    def __init__(self, channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.block1 = ResnetBlock(channels, channels, make_norm)
        self.attention = SpatialAttention(channels, make_norm)
        self.block2 = ResnetBlock(channels, channels, make_norm)

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None) -> Tensor:
        x_NCHW = self.block1(x_NCHW, condition_NDhw)
        x_NCHW = self.attention(x_NCHW, condition_NDhw)
        x_NCHW = self.block2(x_NCHW, condition_NDhw)
        return x_NCHW


class Head(nn.Module):
    """The last norm, swish and convolution."""

    def __init__(self, in_channels: int, out_channels: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm = make_norm(in_channels)
        self.conv = Conv2d(in_channels, out_channels, 3)

    def forward(self, x_NCHW: Tensor, condition_NDhw: Tensor | None) -> tuple[Tensor, Tensor]:
        """What comes out, and what the convolution read."""
        y_NCHW = self.norm(x_NCHW, condition_NDhw, swish=True)
        return self.conv(y_NCHW), y_NCHW


class PyramidShape(NamedTuple):
    """Widths and depths of a pyramid, from the finest level to the coarsest."""

    channels: int
    multipliers: Sequence[int]
    num_blocks: int
    attention_levels: Sequence[int]
    middle: bool = True
    """A block, attention and a block more at the coarsest level."""
    direct: bool = False
    """A change of resolution leads to the next level's channels; otherwise the block after it does."""

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]


class Encoder(nn.Module):
    """From images to latents (N, out_channels, h, w): each level but the last halves rows and columns."""

    middle: Middle | None

    def __init__(
        self, shape: PyramidShape, in_channels: int, out_channels: int, make_norm: MakeNorm = GroupNorm
    ) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = Conv2d(in_channels, widths[0] if shape.direct else shape.channels, 3)
        self.stages = _stages(shape, widths, shape.channels, make_norm, Downsample)
        self.middle = Middle(widths[-1], make_norm) if shape.middle else None
        self.head = Head(widths[-1], out_channels, make_norm)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.conv_in(x_NCHW)
        for stage in self.stages:
            x_NCHW = stage(x_NCHW, None)
        if self.middle is not None:
            x_NCHW = self.middle(x_NCHW, None)
        latents_NDhw: Tensor = self.head(x_NCHW, None)[0]
        return latents_NDhw


class Decoder(nn.Module):
    """From latents (N, in_channels, h, w) to images: the encoder's levels backwards.

    With a `patch_size` above 1 a convolution makes that many rows and columns of pixels of each position of
    the finest level, with so many times fewer channels, before the head.
    """

    middle: Middle | None
    unfold: nn.Module | None

    def __init__(
        self,
        shape: PyramidShape,
        in_channels: int,
        out_channels: int,
        make_norm: MakeNorm,
        patch_size: int,
    ) -> None:
        super().__init__()
        widths = shape.widths[::-1]
        last = len(widths) - 1
        mirrored = shape._replace(attention_levels=[last - level for level in shape.attention_levels])
        self.conv_in = Conv2d(in_channels, widths[0], 3)
        self.middle = Middle(widths[0], make_norm) if shape.middle else None
        self.stages = _stages(mirrored, widths, widths[0], make_norm, Upsample)
        self.patch_size = patch_size
        narrow = max(1, widths[-1] // patch_size)
        self.unfold = Conv2d(widths[-1], narrow * patch_size**2, 3) if patch_size > 1 else None
        self.head = Head(narrow, out_channels, make_norm)

    def forward(self, latents_NDhw: Tensor, condition_NDhw: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images (N, out_channels, H, W), and what the last convolution read."""
        x_NCHW = self.conv_in(latents_NDhw)
        if self.middle is not None:
            x_NCHW = self.middle(x_NCHW, condition_NDhw)
        for stage in self.stages:
            x_NCHW = stage(x_NCHW, condition_NDhw)
        if self.unfold is not None:
            x_NCHW = F.pixel_shuffle(self.unfold(x_NCHW), self.patch_size)
        images_NCHW, last_input = self.head(x_NCHW, condition_NDhw)
        return images_NCHW, last_input


def _stages(
    shape: PyramidShape,
    widths: Sequence[int],
    entry: int,
    make_norm: MakeNorm,
    resample: Callable[[int, int], nn.Module],
) -> nn.ModuleList:
    """The levels in the order in which they run, whose first reads `entry` channels unless `shape.direct`."""
    before = widths if shape.direct else [entry, *widths[:-1]]
    after = [*widths[1:], None] if shape.direct else [*widths[:-1], None]
    return nn.ModuleList(
        Stage(
            read,
            width,
            shape.num_blocks,
            make_norm,
            attends=level in shape.attention_levels,
            resample=None if to is None else resample(width, to),
        )
        for level, (read, width, to) in enumerate(zip(before, widths, after, strict=True))
    )
