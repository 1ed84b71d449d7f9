"""`cantata verify` for AIMv2: features, similarities and gradients against transformers'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cantata.core.types import Images, Segments
from cantata.models.aimv2 import Aimv2Contrastive, Aimv2Encoder, Aimv2VisionConfig
from cantata.models.aimv2.hf import VISION_TYPE, WHOLE_TYPE, Aimv2VisionLayout, read_hub_config
from cantata.models.hub import load_from_hub
from cantata.tools.compared import (
    GRADIENT,
    GRADIENT_BOUND,
    LOGITS_BOUND,
    Check,
    relative_error,
    transformers_model,
)

AIMV2_TYPES = (VISION_TYPE, WHOLE_TYPE)


def compare_aimv2(directory: Path) -> Iterator[Check]:
    """Features, pooled features or similarities, and every gradient, on random images and texts, in fp32.

    Raises `CantataError` for a folder in Apple's words, whose keys transformers does not find.
    """
    layout = read_hub_config(directory)
    model: Aimv2Encoder | Aimv2Contrastive
    if isinstance(layout, Aimv2VisionLayout):
        model, kind = Aimv2Encoder(layout.vision), "Aimv2VisionModel"
    else:
        model, kind = Aimv2Contrastive(*layout), "Aimv2Model"
    load_from_hub(model, layout, directory)
    # Its other kernels let a text without padding see ahead.
    reference = transformers_model(directory, kind, attn_implementation="eager")
    pixels = random_images(layout.vision)
    results = _whole if isinstance(model, Aimv2Contrastive) else _encoder
    found, expected = [], []
    for name, mine, theirs in results(model, reference, pixels):
        yield Check(name, relative_error(mine.detach(), theirs.detach(), theirs.detach()), LOGITS_BOUND)
        weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
        found.append((mine * weight).sum())
        expected.append((theirs * weight).sum())
    torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]
    torch.stack(expected).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient, theirs = parameter.grad, gradients[layout.transformers_name(name)]
        assert gradient is not None
        assert theirs is not None
        theirs = theirs.reshape(gradient.shape)
        yield Check(f"{GRADIENT}{name}", relative_error(gradient, theirs, theirs), GRADIENT_BOUND)


def random_images(vision: Aimv2VisionConfig) -> list[Tensor]:
    """Normalised pixels (C, H, W) of three images: squares, or native ones of several shapes."""
    side, grid = vision.patch_size, vision.grid
    shapes = [(grid, grid)] * 3
    if vision.is_native:
        small = min(grid, 8)
        shapes = [(small, max(1, small // 2)), (max(1, small // 3), small), (1, 1)]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(vision.num_channels, rows * side, columns * side, generator=generator)
        for rows, columns in shapes
    ]


def packed_images(pixels: Sequence[Tensor], vision: Aimv2VisionConfig) -> Images:
    """The same as the native encoder takes them."""
    side, patches, positions = vision.patch_size, [], []
    for image in pixels:
        channels, rows, columns = image.shape[0], image.shape[1] // side, image.shape[2] // side
        blocks = image.view(channels, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        patches.append(blocks.reshape(rows * columns, -1))
        positions.append((torch.arange(rows)[:, None] * vision.grid + torch.arange(columns)).flatten())
    lengths, none = Segments(tuple(map(len, positions))), Segments((0,) * len(pixels))
    return Images(torch.cat(patches), torch.cat(positions), lengths, none, torch.empty(0, dtype=torch.int64))


def _encoder(model: Any, reference: nn.Module, pixels: list[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    images = packed_images(pixels, model.vision_config)
    outputs = [reference(pixel_values=image[None]) for image in pixels]
    yield "features", model(images), torch.cat([output.last_hidden_state[0] for output in outputs])
    if model.vision_config.use_head:
        pooled = torch.cat([output.pooler_output for output in outputs])
        yield "pooled features", model.vision.pooled(images), pooled


def _whole(model: Any, reference: nn.Module, pixels: list[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    text = model.text_config
    generator = torch.Generator().manual_seed(2)
    lengths = [min(text.max_position_embeddings, length) for length in (3, 9, 5)]
    texts = []
    for length in lengths:
        ids = torch.randint(text.vocab_size, (length,), generator=generator)
        # A text's first end is its last token.
        ids[ids == text.eos_token_id] = (text.eos_token_id + 1) % text.vocab_size
        ids[-1] = text.eos_token_id
        texts.append(ids)
    positions = torch.cat([torch.arange(length) for length in lengths])
    features = model.text_features(torch.cat(texts), positions, Segments(tuple(lengths)))
    mine = model.scale() * model.image_features(packed_images(pixels, model.vision_config)) @ features.t()
    rows = []
    for image in pixels:
        inputs = ({"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in texts)
        pairs = [reference(pixel_values=image[None], **one).logits_per_image[0, 0] for one in inputs]
        rows.append(torch.stack(pairs))
    yield "similarities", mine, torch.stack(rows)
