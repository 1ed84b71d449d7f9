"""Samples as tensors, turned back into what people can read."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from cantata.core.samples import Chat, Document, Example, Message, Video
from cantata.data.collate import PackedCollator
from cantata.tools.inspect_data import Picture, Shown, Token, show, weights
from tests.data.helpers import mini_processor

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
RED = Image.new("RGB", (64, 64), (255, 0, 0))


def shown(example: Example) -> Shown:
    collator = PackedCollator(mini_processor())
    sample = collator.encode(example, "s:0")
    return show("s:0", collator.collate([collator.row([sample])], len(sample)), collator.processor)


def test_tokens_weights_and_pixels_come_back() -> None:
    found = shown(
        Chat(
            (
                Message("user", ("look: ", NOISE, " and <|im_end|>")),
                Message("assistant", ("naïve 👩‍🚀",), 0.25),
                Message("assistant", ("no", Video((RED, NOISE))), 0.0),
            )
        )
    )
    words = [item for item in found.items if isinstance(item, Token)]
    assert "".join(item.text for item in words) == (
        "<|im_start|>user\nlook: <fim_prefix><fim_suffix> and <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nnaïve 👩‍🚀<|im_end|>\n"
        "<|im_start|>assistant\nno<fim_prefix><fim_suffix><fim_prefix><fim_suffix><|im_end|>\n"
    )
    learned = [item for item in words if item.weight]
    assert "".join(item.text for item in learned) == "naïve 👩‍🚀<|im_end|>"
    assert {item.weight for item in learned} == {0.25}
    assert [item.text for item in words if item.is_special].count("<|im_end|>") == 3
    pictures = [item for item in found.items if isinstance(item, Picture)]
    assert [picture.modality for picture in pictures] == ["image", "video", "video"]
    for picture, pixels in zip(pictures, (NOISE, RED, NOISE), strict=True):
        assert np.array_equal(np.asarray(picture.image), np.asarray(pixels))
        assert (picture.patches, picture.features) == (64, 16)
    assert found.tokens == sum(len(item.ids) for item in words) + 3 * 16
    assert found.learned == sum(len(item.ids) for item in learned)
    before = found.items[found.items.index(pictures[0]) - 1]
    assert isinstance(before, Token)
    assert before.text == "<fim_prefix>"


def test_images_keep_their_shape_and_padding() -> None:
    processor = mini_processor(min_image_size=16)
    for width, height in [(640, 200), (200, 640), (64, 64), (100, 99)]:
        image = NOISE.resize((width, height))
        [patches] = processor.encode(Document((image,)), "s:0").images
        picture = np.asarray(processor.picture(patches))
        scale = 64 / max(width, height)
        inner = np.asarray(image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC))
        rows, columns = inner.shape[:2]
        assert np.array_equal(picture[:rows, :columns], inner)
        assert not picture[rows:].any()
        assert not picture[:, columns:].any()
        assert picture.shape[0] % 8 == picture.shape[1] % 8 == 0


def test_split_images_are_a_thumbnail_and_crops() -> None:
    collator = PackedCollator(mini_processor(split_image=True))
    sample = collator.encode(Document((NOISE.resize((128, 64)), "wide")), "s:0")
    batch = collator.collate([collator.row([sample])], len(sample))
    items = show("s:0", batch, collator.processor).items
    assert [isinstance(item, Picture) for item in items][:5] == [False, True, True, True, False]


def test_weights_stand_at_the_tokens_they_predict() -> None:
    collator = PackedCollator(mini_processor())
    samples = [collator.encode(Document((text,)), "s:0") for text in ("one two", "three")]
    batch = collator.collate([collator.row(samples)], 64)
    expected = torch.cat([torch.from_numpy(sample.weight_T) for sample in samples])
    # Nothing predicts the first token of a sample.
    expected[[0, len(samples[0])]] = 0
    assert torch.equal(weights(batch)[: len(expected)], expected)
    assert not weights(batch)[len(expected) :].any()
