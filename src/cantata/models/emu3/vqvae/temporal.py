"""The parts of Emu3's tokenizer that mix frames: causal convolutions over latents.

B  clips    D  values of a latent    T, t  frames    h, w  rows and columns of latents
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cantata.nn.batch_norm import BatchNorm
from cantata.nn.conv import CausalConv3d

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class TemporalBlock(nn.Module):
    """Batch norm, swish and causal convolution, twice, beside the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = BatchNorm(channels, BATCH_NORM_EPS, BATCH_NORM_MOMENTUM)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3), 1)
        self.norm2 = BatchNorm(channels, BATCH_NORM_EPS, BATCH_NORM_MOMENTUM)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3), 1)

    def forward(self, x_BDthw: Tensor) -> Tensor:
        y_BDthw: Tensor = self.conv1(F.silu(self.norm1(x_BDthw)))
        y_BDthw = self.conv2(F.silu(self.norm2(y_BDthw)))
        return x_BDthw + y_BDthw


class TemporalEncoder(nn.Module):
    """Halves the number of frames `halvings` times."""

    def __init__(self, channels: int, halvings: int, num_blocks: int) -> None:
        super().__init__()
        self.downs = nn.ModuleList(CausalConv3d(channels, channels, (4, 3, 3), 2) for _ in range(halvings))
        self.blocks = nn.ModuleList(TemporalBlock(channels) for _ in range(num_blocks))

    def forward(self, x_BDThw: Tensor) -> Tensor:
        for down in self.downs:
            x_BDThw = F.silu(down(x_BDThw))
        for block in self.blocks:
            x_BDThw = block(x_BDThw)
        return x_BDThw


class TemporalDecoder(nn.Module):
    """Doubles the number of frames `halvings` times, each frame twice and then a causal convolution."""

    def __init__(self, channels: int, halvings: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TemporalBlock(channels) for _ in range(num_blocks))
        self.ups = nn.ModuleList(CausalConv3d(channels, channels, (3, 3, 3), 1) for _ in range(halvings))

    def forward(self, x_BDthw: Tensor, *, first_only: bool) -> Tensor:
        """All frames, or of a single one that becomes several only the first.

        No frame sees a later one, so the first is what it would be without the others.
        """
        for block in self.blocks:
            x_BDthw = block(x_BDthw)
        for up in self.ups:
            x_BDthw = F.silu(up(x_BDthw if first_only else x_BDthw.repeat_interleave(2, dim=2)))
        return x_BDthw
