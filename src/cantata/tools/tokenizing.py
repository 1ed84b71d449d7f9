"""Images of examples into codes: pixels in batches of one size, codes back to their examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cantata.core import dist
from cantata.core.samples import Chat, Codes, Example, Part
from cantata.data.collate.pixels import ImageCollator, visual_parts
from cantata.data.tokenized import to_record
from cantata.models.protocol import ImageTokenizer
from cantata.train.reconstruction import normalise

NOTHING = Codes(np.empty((0, 0, 0), dtype=np.int64))
"""In the place of an image whose codes are on their way."""


@dataclass(frozen=True)
class Visual:
    """An example, without its images, and their pixels, each at the nearest size."""

    example: Example
    pixels: list[NDArray[np.uint8]]

    def __len__(self) -> int:
        return 1


def visual(example: Example, collator: ImageCollator) -> Any:
    """A `Visual`; raises `DataError` where a part is no pixels. Any, for readers know samples alone."""
    return Visual(_bare(example), [collator.pixels(part) for part in visual_parts(example)])


def _bare(example: Example) -> Example:
    """The example with nothing in its images' places: a shard of them waits in memory at once."""

    def bare(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(part if isinstance(part, str) else NOTHING for part in parts)

    if isinstance(example, Chat):
        return replace(
            example, messages=tuple(replace(one, parts=bare(one.parts)) for one in example.messages)
        )
    return replace(example, parts=bare(example.parts))


class Tokenizing:
    """Examples in, records with codes out; pixels wait until as many of one size have come as go together."""

    def __init__(self, model: ImageTokenizer, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._waiting: dict[tuple[int, ...], list[tuple[int, int, NDArray[np.uint8]]]] = {}
        self._examples: dict[int, Example] = {}
        self._codes: dict[tuple[int, int], NDArray[np.int64]] = {}

    def add(self, index: int, visual: Visual) -> None:
        """Take in an example."""
        self._examples[index] = visual.example
        for place, pixels in enumerate(visual.pixels):
            waiting = self._waiting.setdefault(pixels.shape, [])
            waiting.append((index, place, pixels))
            if len(waiting) == self._batch_size:
                self._encode(pixels.shape)

    def records(self) -> list[dict[str, Any]]:
        """Everything that was added, in the order of indices."""
        for size in list(self._waiting):
            self._encode(size)
        return [
            to_record(
                index, example, [self._codes[index, place] for place in range(len(visual_parts(example)))]
            )
            for index, example in sorted(self._examples.items())
        ]

    @torch.no_grad()
    def _encode(self, size: tuple[int, ...]) -> None:
        waiting = self._waiting.pop(size)
        pixels = torch.from_numpy(np.stack([pixels for _, _, pixels in waiting])).to(dist.device())
        codes = self._model.encode(normalise(pixels)).cpu().numpy()
        for (index, place, _), grid in zip(waiting, codes, strict=True):
            self._codes[index, place] = grid
