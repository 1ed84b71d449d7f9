"""The keys under `data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cantata.core.errors import ConfigError
from cantata.core.schema import slot

OnError = Enum("OnError", {"skip": "skip", "raise": "raise"}, module=__name__)
"""What becomes of a sample that cannot be read: left out and counted, or the end of the run."""

TooLong = Enum("TooLong", {"drop": "drop", "raise": "raise"}, module=__name__)
"""What becomes of a sample longer than a packed row (nothing is ever truncated): left out and counted, or
the end of the run."""

WeightUnit = Enum("WeightUnit", {"samples": "samples", "tokens": "tokens"}, module=__name__)
"""What the weights of sources are shares of."""


@dataclass(frozen=True, kw_only=True)
class ImageSourceConfig:
    """One dataset and how it is treated."""

    weight: float
    """Share of the samples, or of what `data.weight_unit` counts, relative to the other sources."""
    on_error: OnError
    """`skip` or `raise` where a sample cannot be read."""
    max_skipped: float | None
    """Share of the samples read, above 0 and at most 1, that may be left out for whatever reason; the run
    ends where more are, counted since the run began, once 100 samples of the source were read by a stream or
    by a rank. null: no limit."""
    augment: dict[str, Any] | None = slot()
    """Open slot that changes training samples, their images or the whole (`cantata.data.augment`); null: they
    stay as they are, and so they must in held-out data."""
    dataset: dict[str, Any] = slot()
    """Open slot: a `_target_` whose object has a length and gives examples by index."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"weight={self.weight} of a source must be above 0")
        if self.max_skipped is not None and not 0 < self.max_skipped <= 1:
            raise ConfigError(f"max_skipped={self.max_skipped} of a source must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ImageSourceConfig):
    """One dataset of a language model and how it is treated."""

    too_long: TooLong
    """`drop` or `raise` where a sample is longer than `train.sequence_length`."""


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """What is read, in which shares, and how far ahead."""

    num_workers: int
    """Processes of each rank that decode ahead; 0 decodes in the training process."""
    prefetch: int
    """Packed rows that each worker keeps ready."""
    stall_warning: float | None
    """Seconds that a rank waits for its next training batch before it says which sample is being read, and
    again at twice the time and so on; null: it waits in silence."""
    streams: int
    """Independent sequences of samples that are packed apart; a multiple of every number of data-parallel
    ranks that the run may ever have, because each rank owns whole streams."""
    sources: Mapping[str, ImageSourceConfig]
    """Training data by name."""
    held_out: Mapping[str, ImageSourceConfig]
    """Evaluation data by name: every sample once; weights are unused."""

    def __post_init__(self) -> None:
        for key, least in (("num_workers", 0), ("prefetch", 1), ("streams", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}={getattr(self, key)} must be at least {least}")
        if self.stall_warning is not None and not self.stall_warning > 0:
            raise ConfigError(f"data.stall_warning={self.stall_warning} must be above 0, or null for none")
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source")
        for name, source in self.held_out.items():
            if source.augment is not None:
                raise ConfigError(f"data.held_out.{name}.augment must be null: held-out data stays as it is")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImageDataConfig):
    """What besides concerns packed tokens."""

    window: int
    """Samples that a stream holds ready to choose from when it fills a row. A rank keeps
    `streams / ranks * window` encoded samples in memory, at 980 px about 3 MB for each image."""
    weight_unit: WeightUnit
    """`samples`, or `tokens`: weights are turned into shares of samples by each source's tokens a sample, as
    `cantata.data.weights` estimates them when the run starts."""
    cache: str | None
    """Folder for encoded samples, so that each is read and encoded once; null: none. It may be shared and may
    be deleted at any time. Augmented sources are not cached."""
    sources: Mapping[str, SourceConfig]
    held_out: Mapping[str, SourceConfig]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(f"data.window={self.window} must be at least 1")
