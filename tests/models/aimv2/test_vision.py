"""The encoder's parts against their formulas: pixels, positions, pooling, and who sees whom."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cantata.core.types import Segments
from cantata.models.aimv2 import Aimv2VisionConfig
from cantata.models.aimv2.vision import (
    PIXEL_MEAN,
    PIXEL_STD,
    PatchEmbedding,
    PoolingHead,
    VisionTower,
    normalised_patches,
    sincos_positions,
)
from tests.models.aimv2.small import NATIVE, VISION, encoder, images_of, random_pixels


def test_bytes_are_normalised_channel_by_channel_and_floats_stay() -> None:
    patches_PC = torch.randint(0, 256, (5, 48), dtype=torch.uint8)
    found = normalised_patches(patches_PC)
    for value in range(48):
        channel = value // 16
        expected = (patches_PC[:, value] / 255 - PIXEL_MEAN[channel]) / PIXEL_STD[channel]
        torch.testing.assert_close(found[:, value], expected, rtol=1e-6, atol=1e-6)
    assert normalised_patches(found) is found


def test_sines_of_the_column_come_first() -> None:
    """Angle by angle, in double precision; the last position of a grid of 4,096 included."""
    grid, width = 4096, 8
    places = [(0, 0), (0, 3), (5, 0), (4095, 4095)]
    ids = torch.tensor([row * grid + column for row, column in places])
    found = sincos_positions(ids, grid, width, torch.float32)
    for row_D, (row, column) in zip(found, places, strict=True):
        angles = [[place / 10000 ** (i / 2) for i in range(2)] for place in (column, row)]
        expected = [turn(angle) for both in angles for turn in (math.sin, math.cos) for angle in both]
        torch.testing.assert_close(row_D, torch.tensor(expected), rtol=0, atol=1e-7)
    assert sincos_positions(ids, grid, width, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("vision", [VISION, NATIVE], ids=["learned", "computed"])
@torch.no_grad()
def test_a_patch_is_projected_normed_and_placed(vision: Aimv2VisionConfig) -> None:
    torch.manual_seed(0)
    module = PatchEmbedding(vision)
    module.rms_norm.weight.normal_()
    patches_PC, ids = torch.randn(3, 48), torch.tensor([7, 0, 7])
    x_PD = patches_PC @ module.patch_embed.weight.T + module.patch_embed.bias
    x_PD = nn.functional.rms_norm(x_PD, (32,), module.rms_norm.weight, vision.rms_norm_eps)
    if vision.is_native:
        assert module.position_embedding is None
        place = sincos_positions(ids, 10, 32, torch.float32)
    else:
        assert module.position_embedding is not None
        place = module.position_embedding.weight[ids]
    torch.testing.assert_close(module(patches_PC, ids), x_PD + place, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_learned_query_of_each_head_reads_an_image() -> None:
    torch.manual_seed(0)
    head = PoolingHead(12, 3)
    head.cls_token.normal_()
    patches, x_PD = Segments((4, 1, 6)), torch.randn(11, 12)
    rows = []
    for x_SD in x_PD.split(patches.lengths):
        keys, values = x_SD @ head.k_proj.weight.T, x_SD @ head.v_proj.weight.T
        read = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            weights = (keys[:, part] @ head.cls_token[part] / 2.0).softmax(0)
            read.append(weights @ values[:, part])
        rows.append(torch.cat(read))
    expected = torch.stack(rows) @ head.output_proj.weight.T + head.output_proj.bias
    torch.testing.assert_close(head(x_PD, patches), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vision", [VISION, NATIVE], ids=["fixed", "native"])
@torch.no_grad()
def test_packed_images_are_as_if_alone(vision: Aimv2VisionConfig) -> None:
    tower = encoder(replace(vision, use_head=True)).vision
    sizes = [(8, 20), (4, 4), (16, 16)] if vision.is_native else [(16, 16)] * 3
    pixels = random_pixels(*sizes)
    whole = images_of(pixels, vision)
    alone = [images_of([one], vision) for one in pixels]
    torch.testing.assert_close(tower(whole), torch.cat([tower(one) for one in alone]), rtol=0, atol=1e-5)
    expected = torch.cat([tower.pooled(one) for one in alone])
    torch.testing.assert_close(tower.pooled(whole), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_patches_are_a_set_but_for_their_positions() -> None:
    tower, images = encoder(VISION).vision, images_of(random_pixels((16, 16)), VISION)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = replace(images, patches_PC=images.patches_PC[order], position_ids_P=images.position_ids_P[order])
    torch.testing.assert_close(tower(moved), tower(images)[order], rtol=0, atol=1e-5)
    still = replace(images, patches_PC=images.patches_PC[order])
    assert not torch.allclose(tower(still), tower(images)[order], atol=1e-2)


def test_only_a_tower_with_a_head_pools() -> None:
    assert VisionTower(VISION).head is None
    with pytest.raises(AssertionError):
        VisionTower(VISION).pooled(images_of(random_pixels((16, 16)), VISION))
