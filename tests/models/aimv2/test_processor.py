"""Images and captions as AIMv2 reads them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, Message, Video
from cantata.core.types import IMAGE, TEXT, VIDEO
from cantata.models.aimv2.processor import native_grid
from tests.models.aimv2.small import NATIVE, documents, pair_processor, picture, processor

END, IMG = 0, 9


def test_a_sample_is_patches_then_text_that_weighs_one() -> None:
    reader = processor()
    sample = reader.encode(Document((picture(0, 20, 16), "a red circle")), "s:3")
    text = reader.tokenizer.encode("a red circle", add_special_tokens=False).ids
    assert sample.key == "s:3"
    assert sample.input_ids_T.tolist() == [IMG] * 16 + text + [END]
    assert sample.weight_T.tolist() == [0.0] * 16 + [np.float32(1 / (len(text) + 1))] * (len(text) + 1)
    assert sample.modality_ids_T.tolist() == [IMAGE] * 16 + [TEXT] * (len(text) + 1)
    assert [image.num_features for image in sample.images] == [16]
    prompt = reader.encode_prompt(Document((picture(0, 20, 16),)))
    assert prompt.input_ids_T.tolist() == [IMG] * 16
    assert not prompt.weight_T.any()
    assert reader.decode(text) == "a red circle"
    assert reader.spell([END]) == "<|endoftext|>"
    assert reader.stop_token_ids == (END,)


def test_squares_are_scaled_and_cropped() -> None:
    reader, image = processor(), picture(1, 40, 20)
    found = reader.patches(image)
    fitted = ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(reader.picture(found)), np.asarray(fitted))
    assert found.position_ids_P.tolist() == list(range(16))
    first = np.asarray(fitted)[:4, :4].transpose(2, 0, 1).flatten()
    assert np.array_equal(found.patches_PC[0], first)


@pytest.mark.parametrize("size", [(12, 8), (13, 9), (40, 4), (3, 2), (200, 100), (7, 300)])
def test_native_images_keep_their_shape(size: tuple[int, int]) -> None:
    reader = processor(NATIVE)
    found = reader.patches(picture(2, *size))
    shown = reader.picture(found)
    columns, rows = shown.width // 4, shown.height // 4
    assert len(found.patches_PC) == rows * columns <= reader.max_patches
    assert found.position_ids_P.tolist() == [r * 10 + c for r in range(rows) for c in range(columns)]
    if size == (12, 8):
        assert np.array_equal(np.asarray(shown), np.asarray(picture(2, *size)))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 40))
def test_native_grids(width: int, height: int, most: int, grid: int) -> None:
    rows, columns = native_grid(width, height, 14, most, grid)
    assert 1 <= rows <= grid
    assert 1 <= columns <= grid
    assert rows * columns <= most
    if (height / 14) * (width / 14) <= most and max(height, width) / 14 <= grid and rows * columns < most:
        assert (rows, columns) == (max(1, round(height / 14)), max(1, round(width / 14)))


def test_videos_are_frames_and_pixels_are_needed() -> None:
    reader = processor()
    sample = reader.encode(Document((Video((picture(0, 16, 16), picture(1, 16, 16))), "two frames")), "s:0")
    assert len(sample.images) == 2
    assert sample.modality_ids_T[:32].tolist() == [VIDEO] * 32
    with pytest.raises(DataError, match="image codes"):
        reader.encode(Document((Codes(np.zeros((1, 2, 2), np.int64)),)), "s:0")
    with pytest.raises(DataError, match="a conversation"):
        reader.encode(Chat((Message("user", ("hi",)),)), "s:0")
    with pytest.raises(DataError, match="corrupt image"):
        reader.patches(Image.new("RGB", (0, 4)))


def test_text_is_only_ever_text() -> None:
    for reader in (processor(), pickle.loads(pickle.dumps(processor()))):
        sample = reader.encode(Document(("<|endoftext|> <|img|>",)), "s:0")
        assert sample.input_ids_T.tolist().count(END) == 1
        assert IMG not in sample.input_ids_T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 18}, "image_size=18 is no multiple of patch_size=4"),
        ({"max_patches": 15}, "max_patches=15 must be at least 16"),
        ({"image_token_id": 300}, "image_token_id=300 is .* ordinary text"),
        ({"document_end": "<|end|>"}, "the tokenizer has no token '<|end|>'"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|").replace(r"\|\|", "||")):
        processor(**change)
    assert processor(image_token_id=7000).vocab_size == 7001


def test_pairs() -> None:
    reader = pair_processor()
    sample = reader.encode(documents(1)[0], "s:0")
    text = reader.tokenizer.encode("a red circle 0", add_special_tokens=False).ids
    begin = reader.tokenizer.token_to_id("<|im_start|>")
    assert sample.input_ids_T.tolist() == [begin, *text, END]
    assert sample.weight_T.tolist() == [0.0] * (len(text) + 1) + [1.0]
    assert [image.num_features for image in sample.images] == [0]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (("text alone",), "not one image"),
        ((picture(0, 8, 8), picture(1, 8, 8), "two"), "not one image"),
        ((Video((picture(0, 8, 8),)), "clip"), "not one image"),
        ((picture(0, 8, 8),), "no text"),
        ((picture(0, 8, 8), "word " * 30), "long text"),
    ],
)
def test_what_is_no_pair(parts: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        pair_processor().encode(Document(parts), "s:0")
    assert caught.value.reason == reason


def test_a_pair_needs_room() -> None:
    with pytest.raises(ConfigError, match="max_length=2 must be at least 3"):
        pair_processor(max_length=2)
