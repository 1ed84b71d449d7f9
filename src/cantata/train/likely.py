"""Micro-batches to plan for: likely ones, without a file opened, or the largest of those that come first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.types import Batch, PixelBatch, Segments
from cantata.data.assembly import build_image_loader, build_loader
from cantata.models.protocol import (
    ImageTokenizer,
    LanguageModel,
    PairEncoder,
    PatchPredictor,
    ReadsAcross,
    Trainable,
)
from cantata.train.dry_run import synthetic_batch
from cantata.train.optim import deciding_pattern
from cantata.train.stage import LanguageStage, Stage, build_collator
from cantata.train.tokenizer_stage import TokenizerStage

META = torch.device("meta")
CHANNELS = 3
IMAGE_PATH = ("vision.", "projector.")
"""How the names of the parameters begin that only images reach."""
IMAGE_KEYS = {"image_size", "patch_size", "features_per_image"}
TOKENS_PER_IMAGE = 512
"""How many tokens there are for each image that is one of them."""


def likely(stage: Stage, model: nn.Module) -> Batch | PixelBatch:
    """A micro-batch as the config alone lets expect it."""
    if isinstance(stage, TokenizerStage):
        assert isinstance(model, Trainable)
        return likely_images(stage, model)
    assert isinstance(stage, LanguageStage)
    assert isinstance(model, LanguageModel)
    return likely_batch(stage, model)


def row_tokens(stage: Stage, model: Trainable) -> int:
    """Tokens of a row; codes of an image of the largest size."""
    if isinstance(stage, TokenizerStage):
        return likely_images(stage, model).codes_per_image
    assert isinstance(stage, LanguageStage)
    return stage.train.sequence_length


def first_batches(stage: Stage, model: nn.Module, count: int) -> list[Batch | PixelBatch]:
    """Of the first micro-batches that rank 0 reads the one with most patches, and that with most targets.

    Reads the data as training does, in this process. Raises `ConfigError` for what training would refuse.
    """
    shape = {
        "seed": stage.seed,
        "micro_batch_size": stage.train.micro_batch_size,
        "rank": 0,
        "world_size": stage.cluster.gpus,
    }
    if isinstance(stage, TokenizerStage):
        assert isinstance(model, ImageTokenizer)
        images = replace(stage.data, num_workers=0)
        loader = build_image_loader(images, build(stage.collator, grid=model.grid), **shape)
    else:
        assert isinstance(stage, LanguageStage)
        data, length = replace(stage.data, num_workers=0), stage.train.sequence_length
        loader = build_loader(data, build_collator(stage, model), sequence_length=length, **shape)
    with closing(iter(loader)) as batches:
        read = list(islice(batches, count))
    largest = [max(read, key=_visible), max(read, key=lambda batch: batch.num_targets)]
    return largest[: 1 if largest[0] is largest[1] else 2]


def _visible(batch: Batch | PixelBatch) -> int:
    return batch.pixels_BTCHW.numel() if isinstance(batch, PixelBatch) else batch.images.patches.total


def likely_images(stage: TokenizerStage, model: Trainable) -> PixelBatch:
    """A micro-batch of the largest size; clips where the collator takes them."""
    assert isinstance(model, ImageTokenizer)
    count, frames = stage.train.micro_batch_size, stage.collator["frames"]
    height, width = max(stage.collator["sizes"], key=math.prod)
    return PixelBatch(
        torch.empty((count, frames, CHANNELS, height, width), dtype=torch.uint8, device=META),
        is_real_B=torch.ones(count, dtype=torch.bool),
        keys=("image",) * count,
        codes_per_image=math.prod(model.grid(frames, height, width)),
    )


def likely_batch(stage: LanguageStage, model: LanguageModel) -> Batch:
    """Full rows of one sample each; where images are trained on, their features take half of a row.

    For a model that reads images across, one of every `TOKENS_PER_IMAGE` tokens is an image of all its tiles.
    The share is a guess in place of data that a plan does not read. A stage whose rules freeze the tower and
    the projector is taken to have no images; the shapes of others are those that the processor makes.
    """
    rows, length = stage.train.micro_batch_size, stage.train.sequence_length
    if isinstance(model, ReadsAcross):
        return _likely_across(rows, length, model.patches_per_image, stage.collator["processor"])
    processor = stage.collator["processor"]
    if isinstance(model, PatchPredictor | PairEncoder):
        return _likely_patches(model, processor, rows, length)
    path = [name for name, _ in model.named_parameters() if name.startswith(IMAGE_PATH)]
    if not path:
        return synthetic_batch(Segments((length,) * rows), Segments(()), Segments(()), 0)
    unknown = IMAGE_KEYS - processor.keys()
    if unknown:
        raise ConfigError(f"collator.processor.{min(unknown)} is not there, and cantata plan needs it")
    features = processor["features_per_image"]
    patches = (processor["image_size"] // processor["patch_size"]) ** 2
    deciding = [deciding_pattern(name, stage.parameters) for name in path]
    sees = any(pattern is None or not stage.parameters[pattern].frozen for pattern in deciding)
    images = rows * max(1, length // (2 * features)) if sees and features <= length else 0
    return synthetic_batch(
        Segments((length,) * rows),
        Segments((patches,) * images),
        Segments((features,) * images),
        CHANNELS * processor["patch_size"] ** 2,
    )


def _likely_across(rows: int, length: int, patches: int, processor: Mapping[str, Any]) -> Batch:
    if "patch_size" not in processor:
        raise ConfigError("collator.processor.patch_size is not there, and cantata plan needs it")
    step = min(length, TOKENS_PER_IMAGE)
    firsts = [row * length + at for row in range(rows) for at in range(0, length - step + 1, step)]
    firsts = firsts if patches else []
    return synthetic_batch(
        Segments((length,) * rows),
        Segments((patches,) * len(firsts)),
        Segments((1,) * len(firsts)),
        CHANNELS * processor["patch_size"] ** 2,
        firsts,
    )


def _likely_patches(
    model: PatchPredictor | PairEncoder, processor: Mapping[str, Any], rows: int, length: int
) -> Batch:
    """Rows full of images of the most patches, with half of each for a prefix; of pairs the longest texts."""
    patches, values = processor["max_patches"], CHANNELS * processor["patch_size"] ** 2
    if isinstance(model, PairEncoder):
        pairs = rows * (length // processor["max_length"])
        texts = Segments((processor["max_length"],) * pairs)
        return synthetic_batch(texts, Segments((patches,) * pairs), Segments((0,) * pairs), values)
    images = Segments((patches,) * (rows * (length // patches)))
    prefix = Segments((max(1, patches // 2),) * len(images.lengths))
    return synthetic_batch(Segments((length,) * rows), images, images, values, prefix=prefix)
