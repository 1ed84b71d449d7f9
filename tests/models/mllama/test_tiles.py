"""Canvases, sizes and tiles against transformers' processor of images, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cantata.core.samples import DataError
from cantata.models.mllama.tiles import best_canvas, canvases, fitted_size, joined, tile_patches
from cantata.models.mllama.vision import Embeddings
from tests.models.aria.mixed import picture
from tests.models.mllama.small import small_vision

pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")

sides = st.integers(1, 400)


def test_the_published_canvases() -> None:
    assert canvases(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


@settings(max_examples=300)
@given(width=sides, height=sides, most=st.integers(1, 6), size=st.sampled_from([14, 56, 100]))
def test_canvas_and_size_are_those_of_transformers(width: int, height: int, most: int, size: int) -> None:
    canvas = best_canvas(width, height, most, size)
    expected = theirs.get_optimal_tiled_canvas(height, width, most, size)
    assert canvas == (expected[0] // size, expected[1] // size)
    found = fitted_size(width, height, canvas, size)
    assert found[::-1] == theirs.get_image_size_fit_to_canvas(height, width, *expected, size)


@pytest.mark.parametrize(
    ("width", "height"), [(56, 56), (57, 30), (200, 20), (3, 300), (1, 1), (112, 112), (90, 130), (500, 333)]
)
def test_pixels_are_those_of_transformers(width: int, height: int) -> None:
    """Through our tower's normalisation; resized by Pillow on both sides, so that all is the same."""
    vision = small_vision(image_size=56, patch_size=14)
    processor: Any = theirs.MllamaImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=vision.image_mean, image_std=vision.image_std
    )
    image = picture(width, width, height)
    expected = processor(image, return_tensors="pt")
    patches, canvas = tile_patches(image, 4, 56, 14)
    assert 1 + canvases(4).index(canvas) == expected["aspect_ratio_ids"].item()
    count = canvas[0] * canvas[1]
    assert count == expected["aspect_ratio_mask"].sum() == expected["num_tiles"][0][0]
    normalised = Embeddings(vision, 8)._normalised(torch.from_numpy(patches))
    grid = normalised.view(count, 4, 4, 3, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 56, 56)
    torch.testing.assert_close(grid, expected["pixel_values"][0, 0, :count], atol=1e-6, rtol=0)
    assert not expected["pixel_values"][0, 0, count:].any()


@given(width=sides, height=sides)
@settings(max_examples=20)
def test_what_is_cut_can_be_joined_again(width: int, height: int) -> None:
    image = picture(0, width, height)
    patches, canvas = tile_patches(image, 4, 56, 14)
    made = joined(patches, canvas, 56, 14)
    assert made.size == (canvas[1] * 56, canvas[0] * 56)
    size = fitted_size(width, height, canvas, 56)
    whole = np.asarray(made)
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    assert np.array_equal(whole[: size[1], : size[0]], resized)
    assert not whole[size[1] :].any()
    assert not whole[:, size[0] :].any()


def test_torchs_resampling_is_two_levels_off_at_most() -> None:
    """What transformers resizes with where torchvision is installed; noise is the worst of images."""
    for width, height, size in ((130, 90, (112, 56)), (40, 70, (224, 150)), (300, 200, (31, 40))):
        image = picture(0, width, height)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        made = F.interpolate(pixels, size=size[::-1], mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        resized = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR)))
        difference = (made.int() - resized.int()).abs()
        assert difference.max() <= 2
        assert (difference > 0).float().mean() < 0.05


def test_an_image_without_pixels() -> None:
    with pytest.raises(DataError, match="no pixels"):
        tile_patches(Image.new("RGB", (0, 3)), 4, 56, 14)
