"""Mllama's image geometry: which grid of tiles an image gets, and its patches.

    P  patches of all tiles     C  values of a patch (3 * patch_size ** 2)

A canvas is a grid of equal square tiles. The image is made as large as it fits, keeps its shape, and black
fills up the canvas on the right and at the bottom.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cantata.core.samples import DataError


@lru_cache
def canvases(max_num_tiles: int) -> tuple[tuple[int, int], ...]:
    """Tiles down and across of every canvas; an image's aspect ratio id is its place here, from 1."""
    sides = range(1, max_num_tiles + 1)
    return tuple((down, across) for down in sides for across in sides if down * across <= max_num_tiles)


def best_canvas(width: int, height: int, max_num_tiles: int, tile_size: int) -> tuple[int, int]:
    """Tiles down and across for an image: the canvas that enlarges it least, else that shrinks it least.

    Of equally good canvases the smallest, and of these the first.
    """
    choices = canvases(max_num_tiles)
    scales = [min(down * tile_size / height, across * tile_size / width) for down, across in choices]
    enlarging = [scale for scale in scales if scale >= 1]
    best = min(enlarging) if enlarging else max(scales)
    equal = [choice for choice, scale in zip(choices, scales, strict=True) if scale == best]
    return min(equal, key=lambda canvas: canvas[0] * canvas[1])


def fitted_size(width: int, height: int, canvas: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """Width and height of an image on its canvas; neither is enlarged beyond one tile."""
    down, across = canvas
    target_width = min(max(width, tile_size), across * tile_size)
    target_height = min(max(height, tile_size), down * tile_size)
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        return target_width, min(int(height * scale_width) or 1, target_height)
    return min(int(width * scale_height) or 1, target_width), target_height


def tile_patches(
    image: Image.Image, max_num_tiles: int, tile_size: int, patch_size: int
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Patches of an RGB image, tile by tile, each in (channel, row, column) order; and its canvas.

    Bilinear, as Pillow resizes. Raises `DataError` for an image without pixels.
    """
    if not image.width or not image.height:
        raise DataError("corrupt image", "it has no pixels")
    canvas = best_canvas(image.width, image.height, max_num_tiles, tile_size)
    size = fitted_size(image.width, image.height, canvas, tile_size)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    down, across = canvas
    if size != (across * tile_size, down * tile_size):
        padded = np.zeros((down * tile_size, across * tile_size, 3), dtype=np.uint8)
        padded[: size[1], : size[0]] = pixels
        pixels = padded
    side = tile_size // patch_size
    grid = pixels.reshape(down, side, patch_size, across, side, patch_size, 3)
    ordered = np.array(grid.transpose(0, 3, 1, 4, 6, 2, 5), order="C")
    return ordered.reshape(-1, 3 * patch_size**2), canvas


def joined(
    patches_PC: NDArray[np.uint8], canvas: tuple[int, int], tile_size: int, patch_size: int
) -> Image.Image:
    """The canvas that was cut into these patches: the inverse of `tile_patches`."""
    down, across = canvas
    side = tile_size // patch_size
    grid = patches_PC.reshape(down, across, side, side, 3, patch_size, patch_size)
    return Image.fromarray(
        grid.transpose(0, 2, 5, 1, 3, 6, 4).reshape(down * tile_size, across * tile_size, 3)
    )
