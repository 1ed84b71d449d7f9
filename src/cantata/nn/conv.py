"""Convolutions of image and video autoencoders.

N  images or frames    B  clips    T  frames of a clip    C  channels    H, W  rows and columns

Tensors lie channels first in memory: channels last saves time in convolutions, but torch's group norms lose
more than that (on CPU they are up to ten times as slow then, and rounded more coarsely).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps rows and columns, in the dtype of its weight."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW.to(self.weight.dtype))


class Downsample(nn.Module):
    """Half the rows and columns: a 3 x 3 convolution of stride 2, zeros after the last row and column."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out_NCHW: Tensor = self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))
        return out_NCHW


class Upsample(nn.Module):
    """Twice the rows and columns: each value four times, then a 3 x 3 convolution.

    Computed as the one transposed convolution of stride 2 that this is, whose 4 x 4 kernel holds sums of the
    3 x 3 one: 16 products an input position instead of 36.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        kernel_IO44 = _over_single(self.conv.weight)
        return F.conv_transpose2d(x_NCHW, kernel_IO44, self.conv.bias, stride=2, padding=1)


def _over_single(weight_OI33: Tensor) -> Tensor:
    """The transposed convolution's kernel that does over single values what this one does over doubled ones.

    I  channels read    O  channels written
    """
    first, middle, last = torch.eye(3, device=weight_OI33.device).unbind()
    taps_43 = torch.stack((last, middle + last, first + middle, first))
    outputs, inputs = weight_OI33.shape[:2]
    rows = weight_OI33.transpose(0, 1).reshape(-1, 9).float()
    kernel = rows @ torch.kron(taps_43, taps_43).t()
    return kernel.view(inputs, outputs, 4, 4).to(weight_OI33.dtype)


class CausalConv3d(nn.Module):
    """A convolution over frames that sees no later frame than its own: two frames of zeros before the first.

    kernel_size: of (T, H, W); of the last two each is odd and centred.
    time_stride: frames that one output frame stands for.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int], time_stride: int
    ) -> None:
        super().__init__()
        self.padding = (kernel_size[1] // 2, kernel_size[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=(time_stride, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        x_BCTHW = x_BCTHW.to(weight.dtype)
        if x_BCTHW.shape[2] == 1 and weight.shape[2] == 3:
            # All that the earlier taps read is zero.
            x_BCHW = x_BCTHW.squeeze(2)
            return F.conv2d(x_BCHW, weight[:, :, 2], bias, padding=self.padding).unsqueeze(2)
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, 2, 0))
        return F.conv3d(x_BCTHW, weight, bias, self.conv.stride, (0, *self.padding))
