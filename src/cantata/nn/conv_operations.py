"""Operations of convolutional autoencoders, counted by formula.

A multiplication and an addition are two operations. Biases, norms and activations are left out.
"""

from __future__ import annotations

from torch import nn

from cantata.nn.conv import Upsample
from cantata.nn.resnet import Decoder, Encoder, SpatialAttention, SpatialNorm, Stage


def encoder_operations(encoder: Encoder, codes: float) -> float:
    """Of a forward over one position of the coarsest level, in images that have `codes` of them."""
    scale = 4.0 ** (len(encoder.stages) - 1)
    total = products(encoder.conv_in, scale)
    for stage in encoder.stages:
        total += _stage(stage, scale, codes)
        scale /= 4
    return total + _middle(encoder, codes) + products(encoder.head, 1.0)


def decoder_operations(decoder: Decoder, codes: float) -> float:
    """Of a forward from one position of the coarsest level, in images that have `codes` of them."""
    scale = 1.0
    total = products(decoder.conv_in, scale) + _middle(decoder, codes)
    for stage in decoder.stages:
        total += _stage(stage, scale, codes)
        scale *= 4
    if decoder.unfold is not None:
        total += products(decoder.unfold, scale / 4)
    return total + _part(decoder.head, scale / 4 * decoder.patch_size**2, codes)


def products(module: nn.Module, positions: float) -> float:
    """Of every weight that is applied at so many positions."""
    return 2.0 * positions * sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _middle(pyramid: Encoder | Decoder, codes: float) -> float:
    return 0.0 if pyramid.middle is None else _part(pyramid.middle, 1.0, codes)


def _stage(stage: nn.Module, positions: float, codes: float) -> float:
    assert isinstance(stage, Stage)
    total = _part(stage.blocks, positions, codes) + _part(stage.attentions, positions, codes)
    if stage.resample is None:
        return total
    if isinstance(stage.resample, Upsample):
        return total + products(stage.resample, positions) * 16 / 9
    return total + products(stage.resample, positions / 4)


def _part(module: nn.Module, positions: float, codes: float) -> float:
    """What runs at one resolution; norms read their condition at the coarsest."""
    total = products(module, positions)
    for part in module.modules():
        if isinstance(part, SpatialNorm):
            total += products(part, 1.0) - products(part, positions)
        if isinstance(part, SpatialAttention):
            length, channels = positions * codes, part.q_proj.in_features
            total += 4.0 * positions * length * channels
    return total
