"""How an Aria model can read images: at which sizes, whole or split, and the tokens that each way costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import isqrt

from cantata.core.errors import ConfigError
from cantata.models.aria import crops
from cantata.models.aria.model import Aria
from cantata.models.aria.processor import AriaProcessor


def image_sizes(model: Aria) -> dict[int, int]:
    """Features of a crop by the image sizes (pixels) that the model's projector takes, smallest first."""
    patch_size = model.vision_config.patch_size
    patches = sorted(model.projector_config.patch_to_query.items())
    return {isqrt(count) * patch_size: features for count, features in patches}


def read_as(
    processor: AriaProcessor, sizes: Mapping[int, int], image_size: int, split_image: bool
) -> AriaProcessor:
    """The same processor for images of another size, split or whole; `sizes` are those of `image_sizes`.

    Raises `ConfigError` for a size that the model does not take.
    """
    if image_size not in sizes:
        known = " or ".join(map(str, sizes))
        raise ConfigError(f"image_size={image_size}: the model reads images of {known} pixels")
    if image_size < processor.min_image_size:
        raise ConfigError(f"image_size={image_size} is below min_image_size={processor.min_image_size}")
    return _changed(processor, image_size, processor.min_image_size, sizes[image_size], split_image)


def split_grid(processor: AriaProcessor, width: int, height: int) -> tuple[int, int] | None:
    """Crops across and down of an image of so many pixels; None where it stays whole."""
    return crops.split_ratio(width, height, processor.image_size) if processor.split_image else None


def num_crops(processor: AriaProcessor, width: int, height: int) -> int:
    """Crops that an image of so many pixels becomes, the thumbnail included."""
    grid = split_grid(processor, width, height)
    return 1 if grid is None else 1 + grid[0] * grid[1]


def one_token_images(processor: AriaProcessor) -> AriaProcessor:
    """The same processor with one placeholder for an image, whatever it shows: for counting the text."""
    return _changed(processor, processor.patch_size, processor.patch_size, 1, split_image=False)


def _changed(
    processor: AriaProcessor, image_size: int, min_image_size: int, features: int, split_image: bool
) -> AriaProcessor:
    changed = copy.copy(processor)
    changed.image_size, changed.min_image_size = image_size, min_image_size
    changed.features_per_image, changed.split_image = features, split_image
    return changed
