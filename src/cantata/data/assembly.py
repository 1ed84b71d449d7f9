"""From the keys under `data` to what yields batches."""

from __future__ import annotations

from collections.abc import Mapping

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.data.collate.packed import PackedCollator
from cantata.data.config import DataConfig, SourceConfig
from cantata.data.held_out import HeldOut
from cantata.data.loader import Loader
from cantata.data.reading import Source


def build_sources(configs: Mapping[str, SourceConfig], key: str) -> dict[str, Source]:
    """Open the datasets; `key` is where they stand in the config, for messages.

    Raises `ConfigError` where a dataset's file is missing or unusable.
    """
    sources = {}
    for name, config in configs.items():
        try:
            dataset = build(config.dataset)
        except ConfigError as error:
            raise ConfigError(f"{key}.{name}.dataset: {error}") from error
        sources[name] = Source(dataset, config.weight, config.on_error, config.too_long)
    return sources


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
    return Loader(
        build_sources(config.sources, "data.sources"),
        collator,
        seed=seed,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        streams=config.streams,
        window=config.window,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
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
        build_sources(config.held_out, "data.held_out"),
        collator,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        window=config.window,
        rank=rank,
        world_size=world_size,
    )
