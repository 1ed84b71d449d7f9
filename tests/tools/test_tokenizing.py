"""Codes of images in batches: nothing changes places, and images themselves do not wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cantata.core.samples import Chat, Codes, Document, Message
from cantata.data.collate.pixels import visual_parts
from cantata.data.tokenized import from_record
from cantata.tools.tokenizing import Tokenizing, Visual, visual

PLACE: Any = SimpleNamespace()
"""Stands for an image, whose pixels are given beside it."""


class Brightest:
    """Codes that are the first colour of every pixel; notes what came together."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        self.batches.append(tuple(pixels_BTCHW.shape))
        return ((pixels_BTCHW[:, :, 0] + 1) * 127.5).round().long()


def pixels(value: int, rows: int = 2, frames: int = 1) -> NDArray[np.uint8]:
    return np.full((frames, 3, rows, 2), value, dtype=np.uint8)


def codes(part: Any) -> list[int]:
    assert isinstance(part, Codes)
    assert (part.codes_thw == part.codes_thw.flat[0]).all()
    return [*part.codes_thw.shape, int(part.codes_thw.flat[0])]


def test_codes_come_back_to_their_examples_whatever_goes_together() -> None:
    model: Any = Brightest()
    tokenizing = Tokenizing(model, 2)
    # Added out of order, as workers may hand them over.
    tokenizing.add(7, Visual(Document((PLACE, "seven", PLACE)), [pixels(70), pixels(71, rows=4)]))
    tokenizing.add(2, Visual(Document(("two",)), []))
    tokenizing.add(5, Visual(Chat((Message("user", (PLACE, "?")),)), [pixels(50)]))
    tokenizing.add(9, Visual(Document((PLACE, "nine")), [pixels(90, frames=2)]))
    records = tokenizing.records()
    assert [record["index"] for record in records] == [2, 5, 7, 9]
    assert model.batches == [(2, 1, 3, 2, 2), (1, 1, 3, 4, 2), (1, 2, 3, 2, 2)]
    two, five, seven, nine = (from_record(record) for record in records)
    assert two == Document(("two",))
    assert isinstance(five, Chat)
    assert codes(five.messages[0].parts[0]) == [1, 2, 2, 50]
    assert isinstance(seven, Document)
    assert codes(seven.parts[0]) == [1, 2, 2, 70]
    assert seven.parts[1] == "seven"
    assert codes(seven.parts[2]) == [1, 4, 2, 71]
    assert isinstance(nine, Document)
    assert codes(nine.parts[0]) == [2, 2, 2, 90]


def test_images_do_not_wait_beside_their_pixels() -> None:
    collator: Any = SimpleNamespace(pixels=lambda part: pixels(3))
    chat = Chat((Message("user", (PLACE, "?"), 0.5),))
    for example in (Document((PLACE, "text")), chat):
        found = visual(example, collator)
        assert PLACE not in visual_parts(found.example)
        tokenizing = Tokenizing(cast(Any, Brightest()), 1)
        tokenizing.add(0, found)
        [record] = tokenizing.records()
        made = from_record(record)
        assert codes(visual_parts(made)[0]) == [1, 2, 2, 3]
        assert "text" in str(made) or made.messages[0].weight == 0.5
