"""What `cantata verify` gives an Mllama: samples with images on canvases of several shapes, both ways.

P  patches of a tile    C  values of a patch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cantata.core.types import Images, Segments
from cantata.models.mllama.config import MllamaVisionConfig
from cantata.models.mllama.tiles import canvases
from cantata.models.mllama.vision import position_id

PLANS = ((), (1,), (3, 0, -1), (0, 0))
"""Canvases of each sample's images, by their place among all."""


def random_images(
    vision: MllamaVisionConfig, plan: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Normalised patches of images, each (tiles down, tiles across, P, C)."""
    known = canvases(vision.max_num_tiles)
    shapes = [known[place % len(known)] for place in plan]
    return [torch.randn(*shape, vision.patches, vision.patch_values, generator=generator) for shape in shapes]


def pack_images(vision: MllamaVisionConfig | None, images: Sequence[Tensor], token_index_Q: Tensor) -> Images:
    """All images of a batch, natively."""
    if vision is None:
        return Images(torch.zeros(0, 0), token_index_Q, Segments(()), Segments(()), token_index_Q)
    known = canvases(vision.max_num_tiles)
    firsts = [position_id(1 + known.index((image.shape[0], image.shape[1])), vision) for image in images]
    lengths = [image.shape[0] * image.shape[1] * vision.patches for image in images]
    ranges = [torch.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    return Images(
        patches_PC=torch.cat(
            [torch.zeros(0, vision.patch_values), *(image.flatten(0, 2) for image in images)]
        ),
        position_ids_P=torch.cat([torch.zeros(0, dtype=torch.int64), *ranges]),
        patches=Segments(tuple(lengths)),
        features=Segments((1,) * len(images)),
        token_index_Q=token_index_Q,
        first_tokens=tuple(token_index_Q.tolist()),
    )


def image_inputs(
    vision: MllamaVisionConfig, input_ids: Sequence[int], images: Sequence[Tensor], image_token_id: int
) -> dict[str, Tensor]:
    """One sample's images as `MllamaForConditionalGeneration` takes them, each padded to all tiles."""
    known, most = canvases(vision.max_num_tiles), vision.max_num_tiles
    side, channels, size = vision.image_size, vision.num_channels, vision.patch_size
    pixels = torch.zeros(1, len(images), most, channels, side, side)
    tiles = torch.zeros(1, len(images), most, dtype=torch.int64)
    for i, image in enumerate(images):
        grid = image.flatten(0, 1).view(-1, side // size, side // size, channels, size, size)
        made = grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, side, side)
        pixels[0, i, : len(made)] = made
        tiles[0, i, : len(made)] = 1
    seen = _seen(input_ids, image_token_id)
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[1 + known.index((i.shape[0], i.shape[1])) for i in images]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen[None, :, :, None] * tiles[:, None],
    }


def _seen(input_ids: Sequence[int], image_token_id: int) -> Tensor:
    """Which images each token reads, token by token: int64, (tokens, images)."""
    count = sum(token == image_token_id for token in input_ids)
    seen = torch.zeros(len(input_ids), count, dtype=torch.int64)
    group, images, was_image = list[int](), 0, False
    for place, token in enumerate(input_ids):
        is_image = token == image_token_id
        if is_image:
            group = [*group, images] if was_image else [images]
            images += 1
        was_image = is_image
        seen[place, group] = 1
    return seen
