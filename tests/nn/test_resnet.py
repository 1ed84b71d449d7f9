"""Groups of norms, and the widths of pyramids."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cantata.nn.resnet import Decoder, Encoder, GroupNorm, PyramidShape

SHAPE = PyramidShape(4, (1, 2, 3), 1, (1,))


@pytest.mark.parametrize(
    ("channels", "least", "groups"),
    [(128, 1, 32), (48, 1, 16), (32, 1, 32), (128, 4, 32), (32, 4, 8), (48, 4, 4), (6, 4, 1), (3, 4, 1)],
)
def test_groups_divide_the_channels_and_hold_enough_of_them(channels: int, least: int, groups: int) -> None:
    assert GroupNorm(channels, least).groups == groups
    assert channels % groups == 0


def test_the_norm_is_torchs() -> None:
    norm, x_NCHW = GroupNorm(16, 4), torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    twin = nn.GroupNorm(4, 16, eps=1e-6)
    torch.testing.assert_close(norm(x_NCHW, None, swish=False), twin(x_NCHW), atol=1e-6, rtol=1e-6)
    swish = twin(x_NCHW) * twin(x_NCHW).sigmoid()
    torch.testing.assert_close(norm(x_NCHW, None, swish=True), swish, atol=1e-6, rtol=1e-6)


def widths(pyramid: Encoder | Decoder) -> list[tuple[int, ...]]:
    """Of each stage the channels that come in, that it works with, and that leave it."""
    found = []
    for stage in pyramid.stages:
        last = stage.blocks[-1].conv2.out_channels
        leaving = last if stage.resample is None else stage.resample.conv.out_channels
        found.append((stage.blocks[0].conv1.in_channels, last, leaving))
    return found


def test_widths_change_in_blocks_or_between_levels() -> None:
    encoder, decoder = Encoder(SHAPE, 3, 5), Decoder(SHAPE, 5, 3, GroupNorm, 1)
    assert widths(encoder) == [(4, 4, 4), (4, 8, 8), (8, 12, 12)]
    assert widths(decoder) == [(12, 12, 12), (12, 8, 8), (8, 4, 4)]
    direct = SHAPE._replace(direct=True, middle=False)
    assert widths(Encoder(direct, 3, 5)) == [(4, 4, 8), (8, 8, 12), (12, 12, 12)]
    assert widths(Decoder(direct, 5, 3, GroupNorm, 1)) == [(12, 12, 8), (8, 8, 4), (4, 4, 4)]
    assert Encoder(direct, 3, 5).middle is None


@pytest.mark.parametrize("shape", [SHAPE, SHAPE._replace(direct=True, middle=False)])
def test_a_decoder_mirrors_its_encoder(shape: PyramidShape) -> None:
    encoder, decoder = Encoder(shape, 3, 5), Decoder(shape, 5, 3, GroupNorm, 1)
    assert [bool(stage.attentions) for stage in encoder.stages] == [False, True, False]
    assert [bool(stage.attentions) for stage in decoder.stages] == [False, True, False]
    latents_NDhw = encoder(torch.zeros(2, 3, 8, 12))
    assert latents_NDhw.shape == (2, 5, 2, 3)
    images_NCHW, last_input = decoder(latents_NDhw, None)
    assert images_NCHW.shape == (2, 3, 8, 12)
    assert last_input.shape == (2, 4, 8, 12)
