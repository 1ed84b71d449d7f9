"""What Mllama is compared on: the same images natively and as transformers takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.models.mllama.tiles import canvases
from cantata.models.mllama.vision import canvases_of
from cantata.tools.verify_mllama import PLANS, image_inputs, pack_images, random_images
from tests.models.mllama.small import small_vision

VISION = small_vision()
KNOWN = canvases(4)
IMG = 9
PLAN = (3, 0, -1)


def images() -> list[Tensor]:
    return random_images(VISION, PLAN, torch.Generator().manual_seed(0))


def test_plans_hold_no_image_one_and_several_of_other_shapes() -> None:
    assert {len(plan) for plan in PLANS} == {0, 1, 2, 3}
    shapes = [tuple(image.shape) for image in images()]
    assert shapes == [(*KNOWN[place], VISION.patches, VISION.patch_values) for place in PLAN]


def test_natively_a_canvas_is_a_position() -> None:
    given, places = images(), torch.tensor([2, 7, 8])
    found = pack_images(VISION, given, places)
    assert found.patches.lengths == tuple(image.shape[0] * image.shape[1] * 4 for image in given)
    assert canvases_of(found, VISION).tolist() == [1 + place % len(KNOWN) for place in PLAN]
    assert torch.equal(found.patches_PC, torch.cat([image.reshape(-1, 48) for image in given]))
    assert found.first_tokens == (2, 7, 8)
    nothing = pack_images(None, [], torch.empty(0, dtype=torch.int64))
    assert (nothing.patches, nothing.patches_PC.numel()) == (Segments(()), 0)


def test_to_transformers_the_same_pixels_are_tiles_padded_to_four() -> None:
    """Pixel by pixel of every tile, from its patches in (channel, row, column) order."""
    given = images()
    made = image_inputs(VISION, [5, IMG, 6, IMG, IMG, 7], given, IMG)
    assert made["pixel_values"].shape == (1, 3, 4, 3, 8, 8)
    for number, image in enumerate(given):
        count = image.shape[0] * image.shape[1]
        tiles = image.reshape(count, 4, 3, 4, 4)
        found = made["pixel_values"][0, number]
        for tile in range(count):
            for patch in range(4):
                row, column = 4 * (patch // 2), 4 * (patch % 2)
                assert torch.equal(found[tile, :, row : row + 4, column : column + 4], tiles[tile, patch])
        assert not found[count:].any()
        assert made["aspect_ratio_mask"][0, number].tolist() == [1] * count + [0] * (4 - count)
    assert made["aspect_ratio_ids"][0].tolist() == [1 + place % len(KNOWN) for place in PLAN]


def test_who_reads_whom() -> None:
    """A token the image before it; images in a row are read together by what follows them."""
    made = image_inputs(VISION, [5, IMG, 6, IMG, IMG, 7], images(), IMG)
    seen = made["cross_attention_mask"][0].amax(2)
    assert seen.tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [0, 1, 1],
        [0, 1, 1],
    ]
    real = made["aspect_ratio_mask"][0]
    assert torch.equal(made["cross_attention_mask"][0, 5], seen[5, :, None] * real)
