"""From a place in the order to an encoded sample, or to a counted reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cantata.core.errors import CantataError, RunError
from cantata.core.samples import DataError, Example, Sample
from cantata.data.config import OnError, TooLong
from cantata.data.sources import Dataset

Encode = Callable[[Example, str], Sample]


@dataclass(frozen=True)
class Drop:
    """A sample that is left out."""

    source: str
    reason: str
    index: int


@dataclass(frozen=True)
class Source:
    """A dataset with what is done about samples that do not fit."""

    dataset: Dataset
    weight: float
    on_error: OnError
    too_long: TooLong


@dataclass(frozen=True)
class Reader:
    """Reads samples of several sources; the same object serves every process."""

    sources: Mapping[str, Source]
    encode: Encode
    sequence_length: int
    key: str
    """Where the sources stand in the config, for messages."""

    def read(self, name: str, index: int) -> Sample | Drop:
        """One sample. Raises `RunError`, naming it, where its source says `raise` and on any bug."""
        source = self.sources[name]
        sample_key = f"{name}:{index}"
        try:
            sample = self.encode(source.dataset[index], sample_key)
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
