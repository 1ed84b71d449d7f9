"""Several datasets as one, by `{path: weight}` as Aria's users write their `dataset_mixer`."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError, Example
from cantata.data.conversations import Conversations
from cantata.data.formats import Format
from cantata.data.media import PdfOptions, VideoOptions
from cantata.data.order import key, permute
from cantata.data.records import RecordKind
from cantata.data.sources import Dataset
from cantata.data.split import Split


class Portion:
    """A dataset `weight` times over: below one a part of its samples, above one some or all of them again.

    An epoch is `round(weight * n)` samples of n, at least one. What is left of the weight after whole passes
    is a random part, the same in every epoch, and not the first samples.

    Args:
        dataset: n samples.
        weight: above 0.
        seed: decides which samples the part holds.
        name: tells apart datasets of one size.
    """

    def __init__(self, dataset: Dataset, weight: float, seed: int, name: str) -> None:
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"the weight of {name} is {weight}; it must be above 0 (leave it out for none)")
        self.dataset = dataset
        self._size = max(1, round(weight * len(dataset))) if len(dataset) else 0
        self._key = key(seed, "portion", name)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        size = len(self.dataset)
        return self.dataset[permute(index % size, size, self._key)]


class Mixer:
    """Datasets mixed by weights that count samples: an epoch holds `weight` times the samples of each.

    As a source of the loader the whole mix is shuffled together and every sample of it comes once an epoch.
    Held-out samples are not weighted: each comes once.

    Args:
        datasets: weight by path, as in Aria's `dataset_mixer`.
        seed: decides which samples a weight that is no whole number takes.
        records, format, template, root, split, held_out_share, video, pdf: of every dataset, as
            `Conversations` has them.
    """

    def __init__(
        self,
        datasets: dict[str, float],
        seed: int,
        records: RecordKind,
        format: Format,
        template: dict[str, str] | None,
        root: str | None,
        split: Split,
        held_out_share: float,
        video: VideoOptions,
        pdf: PdfOptions,
    ) -> None:
        if not datasets:
            raise ConfigError("datasets is empty: name at least one path with its weight")
        self.parts: dict[str, Dataset] = {}
        """The portion of each dataset, by path."""
        for path, weight in datasets.items():
            dataset = Conversations(path, records, format, template, root, split, held_out_share, video, pdf)
            self.parts[path] = dataset if split is Split.held_out else Portion(dataset, weight, seed, path)
        self._ends = list(accumulate(len(part) for part in self.parts.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        place = bisect_right(self._ends, index)
        path, part = list(self.parts.items())[place]
        try:
            return part[index - (self._ends[place] - len(part))]
        except DataError as error:
            raise DataError(error.reason, f"{path}: {error.detail}") from error
