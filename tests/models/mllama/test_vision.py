"""The tower against one image at a time under a mask, and where positions of tiles lie."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cantata.core.types import Images, Segments
from cantata.models.mllama.tiles import canvases
from cantata.models.mllama.vision import (
    TileLayout,
    TilePosition,
    VisionAttention,
    VisionTower,
    canvases_of,
    position_id,
)
from tests.models.mllama.small import small_layout, small_mllama, small_vision

CONFIG = small_vision()
CPU = torch.device("cpu")
TILES = (1, 3, 4)
CANVASES = (1, 3, 6)
"""Of three images: one tile; one by three; two by two."""


def tower() -> VisionTower:
    found = small_mllama(small_layout()).vision
    assert found is not None
    return found


def images_of(tiles: tuple[int, ...] = TILES, numbers: tuple[int, ...] = CANVASES) -> Images:
    """Random normalised patches; always the same for the same canvas."""
    patches, positions = [], []
    for count, number in zip(tiles, numbers, strict=True):
        generator = torch.Generator().manual_seed(number)
        patches.append(torch.randn(count * CONFIG.patches, CONFIG.patch_values, generator=generator))
        first = position_id(number, CONFIG)
        positions.append(torch.arange(first, first + len(patches[-1])))
    lengths = Segments(tuple(map(len, patches)))
    index = torch.arange(len(tiles))
    features = Segments((1,) * len(tiles))
    return Images(torch.cat(patches), torch.cat(positions), lengths, features, index)


def masked(q: Tensor, k: Tensor, v: Tensor, tiles: int) -> Tensor:
    """One image's attention, all positions in the order of (M, N): padding does not see padding."""
    real = torch.zeros(CONFIG.max_num_tiles, CONFIG.padded_positions, dtype=torch.bool)
    real[:tiles, : CONFIG.positions] = True
    hidden = ~(real.flatten()[:, None] | real.flatten())
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(2), v)


def test_where_positions_lie() -> None:
    """Real ones of all images first, in their order; back again, every position is at its place."""
    layout = TileLayout(CONFIG, TILES, CPU)
    of_image = CONFIG.max_num_tiles * CONFIG.padded_positions
    real = [
        image * of_image + tile * CONFIG.padded_positions + position
        for image, count in enumerate(TILES)
        for tile in range(count)
        for position in range(CONFIG.positions)
    ]
    assert layout.num_real == len(real)
    assert layout.order_X[: len(real)].tolist() == real
    assert sorted(layout.order_X.tolist()) == list(range(3 * of_image))
    assert torch.equal(layout.order_X[layout.back_X], torch.arange(3 * of_image))
    assert layout.tile_index.tolist() == [0, 4, 5, 6, 8, 9, 10, 11]


def test_attention_is_that_under_a_mask() -> None:
    layout, count = TileLayout(CONFIG, TILES, CPU), CONFIG.max_num_tiles * CONFIG.padded_positions
    whole = [torch.randn(3, count, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = torch.stack([masked(*(x[image] for x in whole), TILES[image]) for image in range(3)])
    q, k, v = (x.flatten(0, 1)[layout.order_X] for x in whole)
    found = layout(q, k, v)
    torch.testing.assert_close(found[layout.back_X], expected.flatten(0, 1), rtol=0, atol=1e-6)
    assert torch.equal(layout(q[: layout.num_real], k, v), found[: layout.num_real])


def test_the_last_layer_may_keep_the_real_positions_alone() -> None:
    torch.manual_seed(0)
    layer, layout = VisionAttention(CONFIG), TileLayout(CONFIG, TILES, CPU)
    x_XD = torch.randn(len(layout.order_X), CONFIG.hidden_size)
    whole, kept = layer(x_XD, layout), layer(x_XD, layout, layout.num_real)
    torch.testing.assert_close(kept, whole[: layout.num_real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_an_image_is_read_as_if_it_were_alone(padded: bool) -> None:
    module = tower()
    together = module(images_of(), padded_tiles=padded)
    alone = [
        module(images_of((count,), (number,)), padded_tiles=padded)
        for count, number in zip(TILES, CANVASES, strict=True)
    ]
    expected = torch.cat([one.features_FC for one in alone])
    assert together.features_FC.shape == (together.features.total, CONFIG.feature_size)
    torch.testing.assert_close(together.features_FC, expected, rtol=0, atol=2e-6)
    assert together.features == Segments.concatenate(one.features for one in alone)
    real = tuple(count * CONFIG.positions for count in TILES)
    assert together.readable == real
    every = (CONFIG.max_num_tiles * CONFIG.positions,) * 3
    assert together.features.lengths == (every if padded else real)


@torch.no_grad()
def test_padded_tiles_stand_behind_the_real_ones() -> None:
    module = tower()
    few, many = (module(images_of(), padded_tiles=padded) for padded in (False, True))
    parts = many.features_FC.split(many.features.lengths)
    kept = torch.cat([part[:real] for part, real in zip(parts, many.readable, strict=True)])
    torch.testing.assert_close(kept, few.features_FC, rtol=0, atol=2e-6)


@torch.no_grad()
def test_features_of_layers_in_between_are_interleaved_behind_the_last() -> None:
    """Channel by channel: what layer 0 gave, what layer 2 gave."""
    module, seen = tower(), dict[int, Tensor]()
    for index in CONFIG.intermediate_layers:
        module.layers[index].register_forward_hook(
            lambda *given, index=index: seen.__setitem__(index, given[2])
        )
    found = module(images_of(), padded_tiles=False).features_FC
    size, real = CONFIG.hidden_size, sum(TILES) * CONFIG.positions
    for place, index in enumerate(CONFIG.intermediate_layers):
        assert torch.equal(found[:, size + place :: 2], seen[index][:real])
    assert found[:, size:].shape[1] == 2 * size


@torch.no_grad()
def test_a_tiles_place_is_its_canvas_and_number_behind_a_gate() -> None:
    module = TilePosition(CONFIG, len(canvases(4)))
    nn.init.normal_(module.embedding.weight)
    assert not module(torch.tensor([2, 5])).any()
    module.gate.fill_(0.3)
    found = module(torch.tensor([2, 5]))
    for image, canvas in enumerate((2, 5)):
        for tile in range(4):
            place = module.embedding.weight[canvas, tile * 16 : (tile + 1) * 16]
            torch.testing.assert_close(found[image, tile, 0], math.tanh(0.3) * place, rtol=0, atol=1e-6)


def test_canvases_are_told_by_the_first_position() -> None:
    assert canvases_of(images_of(), CONFIG).tolist() == list(CANVASES)
    assert position_id(2, CONFIG) == 2 * 4 * 4


def test_no_image_is_no_feature_and_a_gradient_of_zero() -> None:
    module = tower()
    none = replace(
        images_of(),
        patches_PC=torch.zeros(0, CONFIG.patch_values),
        position_ids_P=torch.zeros(0, dtype=torch.int64),
        patches=Segments(()),
        features=Segments(()),
    )
    found = module(none, padded_tiles=False)
    assert found.features_FC.shape == (0, CONFIG.feature_size)
    found.features_FC.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("patches", [3, 20])
def test_what_is_no_whole_number_of_tiles(patches: int) -> None:
    images = images_of((1,), (1,))
    wrong = replace(images, patches_PC=torch.zeros(patches, 48), patches=Segments((patches,)))
    with pytest.raises(ValueError, match=f"an image of {patches} patches; a tile has 4, and an image 1 to 4"):
        tower()(wrong, padded_tiles=False)
