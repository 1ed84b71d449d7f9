"""From a place in the order to an encoded sample, or to a counted reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from cantata.core.errors import CantataError, RunError
from cantata.core.samples import DataError, Example, PixelSample, Sample
from cantata.data.augment import Augment, Draw, ExampleAugment, augmented
from cantata.data.cache import SampleCache
from cantata.data.config import OnError, TooLong
from cantata.data.drops import Drops
from cantata.data.sources import Dataset, is_sequential

Encode = Callable[[Example, str], Sample | PixelSample]


LEAST_READS = 100
"""Samples of a source that must have been read before its skipped share counts."""


@dataclass(frozen=True)
class Drop:
    """A sample that is left out."""

    source: str
    reason: str
    index: int


@dataclass(frozen=True)
class Augmentation:
    """Changes a source's samples, in each epoch anew."""

    augment: Augment | ExampleAugment
    seed: int
    """The run's."""

    def __call__(self, example: Example, source: str, index: int, epoch: int) -> Example:
        return augmented(example, self.augment, Draw(self.seed, source, index, epoch))


@dataclass(frozen=True)
class Source:
    """A dataset with what is done about samples that do not fit."""

    dataset: Dataset
    weight: float
    """Share of the samples."""
    on_error: OnError
    too_long: TooLong
    max_skipped: float | None = None
    """Largest share that may be left out; None: any."""
    augmentation: Augmentation | None = None
    cache: SampleCache | None = None
    """Unused where there is an augmentation."""

    @property
    def is_sequential(self) -> bool:
        """Whether it is read in the dataset's order in each epoch, and not shuffled."""
        return is_sequential(self.dataset)


@dataclass(frozen=True)
class Reader:
    """Reads samples of several sources; the same object serves every process."""

    sources: Mapping[str, Source]
    encode: Encode
    sequence_length: int
    key: str
    """Where the sources stand in the config, for messages."""

    def read(self, name: str, index: int, epoch: int = 0) -> Sample | PixelSample | Drop:
        """One sample as it is in `epoch`, which only an augmentation tells from others.

        Raises `RunError`, naming it, where its source says `raise` and on any bug.
        """
        source = self.sources[name]
        sample_key = f"{name}:{index}"
        try:
            sample = self._encoded(source, name, index, epoch)
        except DataError as error:
            if source.on_error is OnError.skip:
                return Drop(name, error.reason, index)
            raise RunError(
                f"sample {sample_key}: {error}; mend it, or set {self.key}.{name}.on_error=skip"
            ) from error
        except CantataError:
            raise
        except Exception as error:
            raise RunError(f"sample {sample_key}: {type(error).__name__}: {error}") from error
        if len(sample) > self.sequence_length:
            if source.too_long is TooLong.drop:
                return Drop(name, "too long", index)
            raise RunError(
                f"sample {sample_key} has {len(sample)} tokens, a packed row {self.sequence_length}; raise "
                f"train.sequence_length, or set {self.key}.{name}.too_long=drop"
            )
        return sample

    def check_skipped(self, reads: Mapping[str, int], drops: Drops) -> None:
        """Raise `RunError` where more than a source's `max_skipped` of the samples read were left out.

        Args:
            reads: samples read, the dropped ones too, by source; under `LEAST_READS` are too few to judge.
            drops: samples left out by source and reason.
        """
        for name, reasons in sorted(drops.items()):
            limit, skipped = self.sources[name].max_skipped, sum(reasons.values())
            if limit is None or reads[name] < LEAST_READS or skipped <= limit * reads[name]:
                continue
            reason = min(reasons, key=lambda text: (-reasons[text], text))
            raise RunError(
                f"{skipped} of {reads[name]} samples of {self.key}.{name} ({skipped / reads[name]:.1%}) were "
                f"left out, most often: {reason} ({reasons[reason]}); max_skipped={limit} allows fewer: mend "
                f"the data, or raise {self.key}.{name}.max_skipped"
            )

    def _encoded(self, source: Source, name: str, index: int, epoch: int) -> Sample | PixelSample:
        sample_key = f"{name}:{index}"
        if source.augmentation is not None:
            example = source.augmentation(source.dataset[index], name, index, epoch)
            return self.encode(example, sample_key)
        if source.cache is None:
            return self.encode(source.dataset[index], sample_key)
        encode = cast(Callable[[Example, str], Sample], self.encode)
        return source.cache.sample(index, sample_key, lambda: encode(source.dataset[index], sample_key))
