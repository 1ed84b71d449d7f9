"""The keys under `data`."""

from __future__ import annotations

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


@dataclass(frozen=True)
class SourceConfig:
    """One dataset and how it is treated."""

    weight: float
    """Share of the samples, relative to the other sources."""
    on_error: OnError
    """`skip` or `raise` where a sample cannot be read."""
    too_long: TooLong
    """`drop` or `raise` where a sample is longer than `train.sequence_length`."""
    dataset: dict[str, Any] = slot()
    """Open slot: a `_target_` whose object has a length and gives examples by index."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"weight={self.weight} of a source must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which shares, and how far ahead."""

    num_workers: int
    """Processes of each rank that decode ahead; 0 decodes in the training process."""
    prefetch: int
    """Packed rows that each worker keeps ready."""
    streams: int
    """Independent sequences of samples that are packed apart; a multiple of every number of data-parallel
    ranks that the run may ever have, because each rank owns whole streams."""
    window: int
    """Samples that a stream holds ready to choose from when it fills a row. A rank keeps
    `streams / ranks * window` encoded samples in memory, at 980 px about 3 MB for each image."""
    sources: dict[str, SourceConfig]
    """Training data by name."""
    held_out: dict[str, SourceConfig]
    """Evaluation data by name: every sample once; weights are unused."""

    def __post_init__(self) -> None:
        for key, least in (("num_workers", 0), ("prefetch", 1), ("streams", 1), ("window", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}={getattr(self, key)} must be at least {least}")
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one source")
