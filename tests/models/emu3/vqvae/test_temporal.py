"""What mixes frames: causality, numbers of frames, and a block against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.models.emu3.vqvae.temporal import TemporalBlock, TemporalDecoder, TemporalEncoder


def clip(frames: int) -> Tensor:
    return torch.randn(2, 3, frames, 4, 4, generator=torch.Generator().manual_seed(0))


def changed_frames(before: Tensor, after: Tensor) -> list[int]:
    return (before - after).abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()


@torch.no_grad()
def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block, x = TemporalBlock(3).eval(), clip(5)
    for norm in (block.norm1, block.norm2):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    y = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        shape = (1, 3, 1, 1, 1)
        mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
        y = (y - mean) / (variance + 1e-5).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)
        y = y * y.sigmoid()
        # Two frames of zeros before the first; rows and columns keep their number.
        y = F.conv3d(F.pad(y, (1, 1, 1, 1, 2, 0)), conv.conv.weight, conv.conv.bias)
    torch.testing.assert_close(block(x), x + y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("halvings", [0, 1, 2])
@torch.no_grad()
def test_the_encoder_halves_frames_and_no_frame_sees_a_later_one(halvings: int) -> None:
    torch.manual_seed(0)
    encoder, x = TemporalEncoder(3, halvings, 1).eval(), clip(8)
    found = encoder(x)
    assert found.shape == (2, 3, 8 >> halvings, 4, 4)
    later = x.clone()
    later[:, :, 4:] += 1.0
    assert min(changed_frames(found, encoder(later))) == 4 >> halvings


@pytest.mark.parametrize("halvings", [0, 1, 2])
@torch.no_grad()
def test_the_decoder_doubles_frames_and_no_frame_sees_a_later_one(halvings: int) -> None:
    torch.manual_seed(0)
    decoder, x = TemporalDecoder(3, halvings, 1).eval(), clip(3)
    found = decoder(x, first_only=False)
    assert found.shape == (2, 3, 3 << halvings, 4, 4)
    later = x.clone()
    later[:, :, 1:] += 1.0
    assert min(changed_frames(found, decoder(later, first_only=False))) == 1 << halvings


@torch.no_grad()
def test_the_first_frame_alone_is_the_first_of_all() -> None:
    torch.manual_seed(0)
    decoder, x = TemporalDecoder(3, 2, 1).eval(), clip(1)
    first, every = decoder(x, first_only=True), decoder(x, first_only=False)
    assert (first.shape[2], every.shape[2]) == (1, 4)
    torch.testing.assert_close(first, every[:, :, :1], rtol=1e-6, atol=1e-6)
