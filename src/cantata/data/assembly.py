"""From the keys under `data` to what yields batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.data.cache import SampleCache, identify
from cantata.data.collate.packed import PackedCollator
from cantata.data.collate.pixels import ImageCollator
from cantata.data.config import (
    DataConfig,
    ImageDataConfig,
    ImageSourceConfig,
    SourceConfig,
    TooLong,
    WeightUnit,
)
from cantata.data.held_out import HeldOut
from cantata.data.loader import Loader
from cantata.data.reading import Augmentation, Reader, Source
from cantata.data.weights import weights_of_tokens

log = logging.getLogger(__name__)


def build_sources(
    configs: Mapping[str, ImageSourceConfig],
    key: str,
    seed: int,
    cache: str | None = None,
    processor: Processor | None = None,
) -> dict[str, Source]:
    """Open the datasets.

    Args:
        configs: by name.
        key: where they stand in the config, for messages.
        seed: decides augmentations.
        cache: folder of encoded samples, or None.
        processor: what encodes them; wanted where there is a cache.

    Raises `ConfigError` where a dataset's file is missing or unusable.
    """
    sources = {}
    for name, config in configs.items():
        dataset = _built(config.dataset, f"{key}.{name}.dataset")
        augmentation = None
        if config.augment is not None:
            augmentation = Augmentation(_built(config.augment, f"{key}.{name}.augment"), seed)
        too_long = config.too_long if isinstance(config, SourceConfig) else TooLong.drop
        sources[name] = Source(
            dataset, config.weight, config.on_error, too_long, config.max_skipped, augmentation
        )
        if cache is not None and augmentation is None:
            assert processor is not None
            identity = identify(config.dataset, len(dataset), processor)
            if identity is None:
                log.warning("%s.%s is not cached: no file tells its data from other data", key, name)
                continue
            sources[name] = replace(sources[name], cache=SampleCache(Path(cache).expanduser(), identity))
    return sources


def _built(node: dict[str, Any], key: str) -> Any:
    try:
        return build(node)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def build_loader(
    config: DataConfig,
    collator: PackedCollator,
    *,
    seed: int,
    sequence_length: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Loader:
    """The training batches of data-parallel rank `rank` of `world_size`."""
    sources = build_sources(config.sources, "data.sources", seed, config.cache, collator.processor)
    if config.weight_unit is WeightUnit.tokens:
        sources = weights_of_tokens(Reader(sources, collator.encode, sequence_length, "data.sources"))
    return Loader(
        sources,
        collator,
        seed=seed,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        streams=config.streams,
        window=config.window,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        stall_warning=config.stall_warning,
        rank=rank,
        world_size=world_size,
    )


def build_held_out(
    config: DataConfig,
    collator: PackedCollator,
    *,
    sequence_length: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> HeldOut:
    """The evaluation batches of data-parallel rank `rank` of `world_size`; none where nothing is held out."""
    return HeldOut(
        build_sources(config.held_out, "data.held_out", 0, config.cache, collator.processor),
        collator,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        window=config.window,
        rank=rank,
        world_size=world_size,
    )


def build_image_loader(
    config: ImageDataConfig,
    collator: ImageCollator,
    *,
    seed: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Loader:
    """The training batches of images of data-parallel rank `rank` of `world_size`.

    A row holds a micro-batch: as many images as a row of text holds tokens.
    """
    return Loader(
        build_sources(config.sources, "data.sources", seed),
        collator,
        seed=seed,
        sequence_length=micro_batch_size,
        micro_batch_size=1,
        streams=config.streams,
        window=1,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        stall_warning=config.stall_warning,
        rank=rank,
        world_size=world_size,
    )


def build_held_out_images(
    config: ImageDataConfig, collator: ImageCollator, *, micro_batch_size: int, rank: int, world_size: int
) -> HeldOut:
    """The evaluation batches of images of data-parallel rank `rank` of `world_size`."""
    return HeldOut(
        build_sources(config.held_out, "data.held_out", 0),
        collator,
        sequence_length=micro_batch_size,
        micro_batch_size=1,
        window=1,
        rank=rank,
        world_size=world_size,
    )
