"""How images can be read, and the crops that follow from their sizes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cantata.core.build import build
from cantata.core.config import compose, resolved
from cantata.core.errors import ConfigError
from cantata.core.samples import Document
from cantata.models.aria.reading import image_sizes, num_crops, one_token_images, read_as, split_grid
from tests.data.helpers import mini_processor
from tests.recipes.runner import TINY

SIZES = {32: 4, 64: 16}


def test_sizes_are_those_of_the_projector() -> None:
    node = compose("pretrain", [*TINY, "+model.projector.patch_to_query={16: 4, 64: 16}"]).node
    with torch.device("meta"):
        model = build(resolved(node)["model"])
    assert list(image_sizes(model).items()) == list(SIZES.items())


def test_another_reading_is_that_of_a_processor_made_so() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    own = mini_processor(min_image_size=16)
    found = read_as(own, SIZES, 32, True).encode(Document(("a", image)), "k")
    made = mini_processor(min_image_size=16, image_size=32, features_per_image=4, split_image=True)
    expected = made.encode(Document(("a", image)), "k")
    assert found.input_ids_T.tolist() == expected.input_ids_T.tolist()
    assert len(found.images) == len(expected.images) > 1
    for one, other in zip(found.images, expected.images, strict=True):
        assert np.array_equal(one.patches_PC, other.patches_PC)
        assert np.array_equal(one.position_ids_P, other.position_ids_P)
    assert (own.image_size, own.split_image, own.features_per_image) == (64, False, 16)


def test_sizes_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="image_size=48: the model reads images of 32 or 64 pixels"):
        read_as(mini_processor(min_image_size=16), SIZES, 48, False)
    with pytest.raises(ConfigError, match="image_size=32 is below min_image_size=64"):
        read_as(mini_processor(), SIZES, 32, False)


@pytest.mark.parametrize("size", [(64, 64), (130, 90), (40, 400), (900, 70)])
@pytest.mark.parametrize("split_image", [True, False])
def test_crops_from_sizes_alone(size: tuple[int, int], split_image: bool) -> None:
    processor = mini_processor(split_image=split_image)
    sample = processor.encode(Document((Image.new("RGB", size),)), "k")
    assert num_crops(processor, *size) == len(sample.images)
    grid = split_grid(processor, *size)
    assert (grid is None) == (not split_image)


def test_one_token_for_an_image() -> None:
    small = one_token_images(mini_processor(split_image=True))
    parts = (Image.new("RGB", (300, 90)), Image.new("RGB", (1, 1)))
    ids = small.encode_prompt(Document(parts)).input_ids_T.tolist()
    assert ids.count(small.image_token_id) == 2
