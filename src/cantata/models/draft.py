"""A sample while its pieces are put together.

T  tokens
"""

from __future__ import annotations

import numpy as np

from cantata.core.samples import ImagePatches, Sample
from cantata.core.types import TEXT


class Draft:
    """A sample under construction."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.modalities: list[int] = []
        self.images: list[ImagePatches] = []

    def add(self, ids: list[int], *, weight: float, modality: int = TEXT) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.modalities += [modality] * len(ids)

    def sample(self, key: str) -> Sample:
        return Sample(
            key,
            np.array(self.ids, dtype=np.int32),
            np.array(self.weights, dtype=np.float32),
            np.array(self.modalities, dtype=np.int8),
            tuple(self.images),
        )
