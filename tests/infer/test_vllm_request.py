"""The request for vLLM, without vLLM: its tokens once expanded, and its pixels as transformers reads them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.infer.pdf import example_of, page_parts
from cantata.infer.vllm_request import build_request, expanded
from tests.data.helpers import mini_processor


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_expanded_tokens_are_those_of_our_processor() -> None:
    processor = mini_processor(split_image=True)
    pages = [noise(122, 158), noise(300, 90)]
    example = example_of((*page_parts(enumerate(pages, 1)), "What <|img|> is it?"), is_chat=True)
    sample = processor.encode_prompt(example)
    request = build_request(sample, processor, processor.features_per_image)
    assert expanded(request, processor.image_token_id) == sample.input_ids_T.tolist()
    assert (
        request.prompt_token_ids.count(processor.image_token_id) == len(request.images) == len(sample.images)
    )
    # One pair of marks around all crops of a page.
    text = processor.spell(request.prompt_token_ids)
    assert text.startswith("<|im_start|>user\nPage 1: <fim_prefix><|img|><|img|><|img|>")
    assert text.count("<fim_prefix>") == text.count("<fim_suffix>") == 2
    assert [image.width <= 64 and image.height <= 64 for image in request.images] == [True] * len(
        request.images
    )


def test_text_alone() -> None:
    processor = mini_processor()
    sample = processor.encode_prompt(example_of(("Speak",), is_chat=True))
    request = build_request(sample, processor, 256)
    assert request.prompt_token_ids == sample.input_ids_T.tolist()
    assert request.images == []


def test_an_image_size_that_vllm_cannot_take() -> None:
    processor = mini_processor()
    sample = processor.encode_prompt(example_of((noise(64, 64),), is_chat=True))
    with pytest.raises(
        ConfigError, match="vLLM makes 256 tokens of every image, and images of image_size=64"
    ):
        build_request(sample, processor, 256)


def test_transformers_reads_the_pixels_that_our_tower_gets() -> None:
    """vLLM hands images to transformers' image processor: it must find nothing left to do."""
    transformers = pytest.importorskip("transformers")
    side, patch = 490, 14
    processor = mini_processor(
        image_size=side, min_image_size=336, patch_size=patch, position_grid=70, split_image=True
    )
    sample = processor.encode_prompt(example_of((noise(700, 1011),), is_chat=False))
    request = build_request(sample, processor, processor.features_per_image)
    reader = transformers.AriaImageProcessor(max_image_size=side, min_image_size=336, split_image=False)
    read = reader(request.images, return_tensors="np")
    grid = side // patch
    for index, image in enumerate(sample.images):
        cut = np.asarray(read["pixel_values"][index]).reshape(3, grid, patch, grid, patch)
        theirs_PC = cut.transpose(1, 3, 0, 2, 4).reshape(grid**2, -1)
        mask = np.asarray(read["pixel_mask"][index]).reshape(grid, patch, grid, patch)
        is_valid_P = mask.any(axis=(1, 3)).reshape(-1)
        assert is_valid_P.sum() == len(image.patches_PC)
        ours_PC = image.patches_PC.astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(theirs_PC[is_valid_P], ours_PC, atol=1e-6)
