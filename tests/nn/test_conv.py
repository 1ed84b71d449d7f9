"""Convolutions against the operations they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.nn.conv import CausalConv3d, Conv2d, Downsample, Upsample


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def compare(ours: Tensor, theirs: Tensor, of: list[Tensor]) -> None:
    """Values, and the gradients of a loss that weighs each differently; sums of about 100 products each."""
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    weights = torch.linspace(-1, 1, ours.numel()).reshape(ours.shape)
    grads = [torch.autograd.grad((out * weights).sum(), of) for out in (ours, theirs)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)


def test_upsampling_is_a_convolution_over_repeated_values() -> None:
    layer = Upsample(5, 3)
    x_NCHW = rand(2, 5, 4, 3)
    twice_NCHW = F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest")
    plain = F.conv2d(twice_NCHW, layer.conv.weight, layer.conv.bias, padding=1)
    compare(layer(x_NCHW), plain, [x_NCHW, *layer.parameters()])


def test_downsampling_pads_the_end_alone() -> None:
    layer = Downsample(1, 1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    out_NCHW = layer(torch.ones(1, 1, 4, 4))
    assert out_NCHW.flatten().tolist() == [9.0, 6.0, 6.0, 4.0]


@pytest.mark.parametrize(
    ("taps", "stride", "frames"),
    [((3, 3, 3), 1, 1), ((3, 3, 3), 1, 4), ((3, 1, 1), 1, 1), ((3, 1, 1), 1, 4), ((4, 3, 3), 2, 4)],
)
def test_causal_convolutions_pad_time_in_front(taps: tuple[int, int, int], stride: int, frames: int) -> None:
    layer = CausalConv3d(3, 4, taps, stride)
    x_BCTHW = rand(2, 3, frames, 5, 4)
    side = taps[1] // 2
    padded = F.pad(x_BCTHW, (side, side, side, side, 2, 0))
    plain = F.conv3d(padded, layer.conv.weight, layer.conv.bias, (stride, 1, 1))
    compare(layer(x_BCTHW), plain, [x_BCTHW, *layer.parameters()])


def test_no_frame_sees_a_later_one() -> None:
    layer = CausalConv3d(2, 2, (3, 3, 3), 1)
    x_BCTHW = rand(1, 2, 4, 3, 3).detach()
    changed = x_BCTHW.clone()
    changed[:, :, 2:] += 1.0
    assert torch.equal(layer(x_BCTHW)[:, :, :2], layer(changed)[:, :, :2])


def test_the_input_takes_the_dtype_of_the_weight() -> None:
    assert Conv2d(2, 3, 3).bfloat16()(torch.ones(1, 2, 4, 4)).dtype is torch.bfloat16
    assert CausalConv3d(2, 3, (3, 3, 3), 1).bfloat16()(torch.ones(1, 2, 2, 4, 4)).dtype is torch.bfloat16
