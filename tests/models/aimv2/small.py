"""AIMv2s of a few thousand parameters, and images and pairs for them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cantata.core.samples import Document
from cantata.core.types import Batch, Images, Segments, StepTotals
from cantata.data.collate import PackedCollator, PrefixCollator
from cantata.models.aimv2 import (
    Aimv2Contrastive,
    Aimv2DecoderConfig,
    Aimv2Encoder,
    Aimv2PairProcessor,
    Aimv2Pretraining,
    Aimv2Processor,
    Aimv2TextConfig,
    Aimv2VisionConfig,
)

VISION = Aimv2VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    num_channels=3,
    rms_norm_eps=1e-5,
    is_native=False,
    use_head=False,
    initializer_range=0.2,
)
NATIVE = replace(VISION, is_native=True, image_size=40)
KINDS = {"fixed": VISION, "native": NATIVE}
TEXT = Aimv2TextConfig(
    vocab_size=6144,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=20,
    eos_token_id=0,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
)
DECODER = Aimv2DecoderConfig(
    vocab_size=6144,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    initializer_range=0.2,
)


def filled(model: Any, seed: int = 0) -> Any:
    """Initial values, with norms and biases moved off 1 and 0 so that tests see them."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            section = name.split(".")[-2:]
            if isinstance(model, Aimv2Encoder):
                _fill(tensor, section, generator)
            else:
                model.init_parameter(name, tensor, generator)
            if tensor.dim() == 1 and name != "logit_scale":
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def _fill(tensor: nn.Parameter, section: list[str], generator: torch.Generator) -> None:
    tensor.normal_(0.0, 0.2, generator=generator)
    if "norm" in section[0]:
        tensor += 1.0


def encoder(vision: Aimv2VisionConfig, seed: int = 0) -> Aimv2Encoder:
    return filled(Aimv2Encoder(vision), seed)


def contrastive(vision: Aimv2VisionConfig = VISION, seed: int = 0, **text: Any) -> Aimv2Contrastive:
    return filled(Aimv2Contrastive(replace(vision, use_head=True), replace(TEXT, **text), 12, 100.0), seed)


def pretraining(vision: Aimv2VisionConfig = VISION, seed: int = 0) -> Aimv2Pretraining:
    return filled(Aimv2Pretraining(vision, DECODER), seed)


def cut(pixels_CHW: Tensor, vision: Aimv2VisionConfig) -> tuple[Tensor, Tensor]:
    """Patches (P, C) of normalised pixels, in (channel, row, column) order, and their position ids."""
    size, grid = vision.patch_size, vision.grid
    channels, rows, columns = pixels_CHW.shape[0], pixels_CHW.shape[1] // size, pixels_CHW.shape[2] // size
    blocks = pixels_CHW.view(channels, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    positions = torch.arange(rows)[:, None] * grid + torch.arange(columns)
    return blocks.reshape(rows * columns, -1), positions.flatten()


def images_of(pixels: Sequence[Tensor], vision: Aimv2VisionConfig) -> Images:
    """Normalised images (C, H, W), packed, without places among tokens."""
    parts = [cut(image, vision) for image in pixels]
    lengths = Segments(tuple(len(positions) for _, positions in parts))
    empty = torch.empty(0, dtype=torch.int64)
    return Images(
        torch.cat([patches for patches, _ in parts]),
        torch.cat([positions for _, positions in parts]),
        lengths,
        Segments((0,) * len(pixels)),
        empty,
    )


def random_pixels(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, height, width, generator=generator) for height, width in sizes]


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor(vision: Aimv2VisionConfig = VISION, **changes: Any) -> Aimv2Processor:
    given: dict[str, Any] = {
        "tokenizer": "embedded:tokenizer.json",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "is_native": vision.is_native,
        "max_patches": 30,
        "image_token_id": 9,
        "document_end": "<|endoftext|>",
        "pad_token": "<|pad|>",
    }
    return Aimv2Processor(**(given | changes))


def pair_processor(vision: Aimv2VisionConfig = VISION, **changes: Any) -> Aimv2PairProcessor:
    given: dict[str, Any] = {
        "tokenizer": "embedded:tokenizer.json",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "is_native": vision.is_native,
        "max_patches": 30,
        "text_begin": "<|im_start|>",
        "text_end": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "max_length": 20,
    }
    return Aimv2PairProcessor(**(given | changes))


CAPTIONS = ("a red circle", "two cats on a mat", "snow", "a very tall ladder by the wall")


def documents(count: int = 4, seed: int = 0) -> list[Document]:
    """Images of several shapes with captions."""
    sizes = ((16, 16), (23, 12), (9, 30), (40, 40))
    return [
        Document((picture(seed + index, *sizes[index % 4]), CAPTIONS[index % 4] + f" {index}"))
        for index in range(count)
    ]


def pair_batch(count: int = 4, vision: Aimv2VisionConfig = VISION, seed: int = 0) -> Batch:
    """Pairs in one row, with a tail of padding."""
    collator = PackedCollator(pair_processor(vision))
    samples = [collator.encode(one, f"pairs:{i}") for i, one in enumerate(documents(count, seed))]
    return collator.collate([collator.row(samples)], sum(map(len, samples)) + 3)


def patch_batch(count: int, vision: Aimv2VisionConfig, *, first: int = 0, padding: int = 0) -> Batch:
    """Samples of pretraining end to end in one row, with prefixes."""
    collator = PrefixCollator(processor(vision))
    encoded = [collator.encode(one, f"s:{i}") for i, one in enumerate(documents(8))][first : first + count]
    return collator.collate([collator.row(encoded)], sum(map(len, encoded)) + padding)


def totals_of(batch: Batch) -> StepTotals:
    return StepTotals(batch.num_tokens, batch.num_targets, batch.target_weight)
