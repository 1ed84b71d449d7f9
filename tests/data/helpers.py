"""Small datasets and a small Aria for the data tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from cantata.core.samples import DataError, Document, Example, ImagePatches, Sample
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator
from cantata.data.config import OnError, TooLong
from cantata.data.loader import Loader
from cantata.data.reading import Source
from cantata.data.sources import CaptionedImages, TextDocuments
from cantata.data.split import Split
from cantata.models.aria.crops import Resampling
from cantata.models.aria.processor import AriaProcessor

TOKENS = {
    "image_token": "<|img|>",
    "image_prefix": "<fim_prefix>",
    "image_suffix": "<fim_suffix>",
    "message_start": "<|im_start|>",
    "message_end": "<|im_end|>",
    "document_end": "<|endoftext|>",
    "pad_token": "<|pad|>",
}


def mini_processor(**changes: Any) -> AriaProcessor:
    sizes = {
        "image_size": 64,
        "min_image_size": 64,
        "patch_size": 8,
        "position_grid": 8,
        "features_per_image": 16,
        "split_image": False,
        "resampling": Resampling.pillow,
        "chat_template": None,
    }
    return AriaProcessor(**({"tokenizer": "embedded:tokenizer.json"} | sizes | TOKENS | changes))


class Words:
    """Documents of known lengths in characters; some cannot be read."""

    def __init__(self, name: str, lengths: Sequence[int], broken: Sequence[int] = ()) -> None:
        self.name = name
        self.lengths = lengths
        self.broken = broken

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if index in self.broken:
            raise DataError("corrupt image", f"number {index}")
        return Document(("x" * self.lengths[index],))


class Letters:
    """A processor whose tokens are characters: token counts are plain to see."""

    pad_token_id = 1
    image_token_id = 9
    vocab_size = 128
    patch_values = 3
    stop_token_ids = (0,)

    def encode(self, example: Example, key: str) -> Sample:
        assert isinstance(example, Document)
        ids: list[int] = []
        images = []
        for part in example.parts:
            if isinstance(part, str):
                ids += [ord(letter) for letter in part]
            else:
                ids += [self.image_token_id] * 2
                patches = np.asarray(part.resize((2, 2))).reshape(4, 3)
                images.append(ImagePatches(patches, np.arange(4), 2))
        ids_T = np.array(ids, dtype=np.int32)
        is_image = ids_T == self.image_token_id
        return Sample(key, ids_T, ~is_image, is_image.astype(np.int8), tuple(images))

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        return self.encode(example, key)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids)


def source(
    dataset: Any, weight: float = 1.0, on_error: str = "skip", too_long: str = "drop", **more: Any
) -> Source:
    return Source(dataset, weight, OnError[on_error], TooLong[too_long], **more)


def embedded_sources(split: Split = Split.train) -> dict[str, Source]:
    images = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", split, 0.05)
    text = TextDocuments("embedded:tinyshakespeare.txt", 800, split, 0.05)
    return {"emoji": source(images, 4.0), "text": source(text)}


def letters_loader(sources: dict[str, Source], **changes: Any) -> Loader:
    settings = {
        "seed": 7,
        "sequence_length": 32,
        "micro_batch_size": 1,
        "streams": 4,
        "window": 4,
        "num_workers": 0,
        "prefetch": 2,
        "stall_warning": None,
        "rank": 0,
        "world_size": 1,
    }
    return Loader(sources, PackedCollator(Letters()), **(settings | changes))


def keys(batch: Batch) -> list[str]:
    return [name for row in batch.rows for name in row.samples]


def assert_same(left: Batch, right: Batch) -> None:
    assert left.rows == right.rows
    assert left.samples == right.samples
    for name in (
        "input_ids_T",
        "labels_T",
        "position_ids_T",
        "modality_ids_T",
        "target_index_N",
        "target_modality_N",
    ):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for name in ("patches_PC", "position_ids_P", "token_index_Q"):
        assert torch.equal(getattr(left.images, name), getattr(right.images, name)), name
    assert left.images.patches == right.images.patches
    assert left.images.features == right.images.features


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
