"""Samples of every kind through the real processor and collator, for an Aria of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from cantata.core.samples import Chat, Document, Example, Message, Sample, Video
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator
from cantata.models.aria.hf import AriaLayout
from tests.data.helpers import mini_processor
from tests.models.aria.small import small_layout


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


WIDE, TALL, SQUARE, SMALL = (picture(*it) for it in ((0, 40, 20), (1, 13, 39), (2, 24, 24), (3, 5, 4)))
CLIP = Video(tuple(picture(seed, 32, 18) for seed in range(4, 7)))

PLAIN, SPLIT, COARSE = {}, {"split_image": True}, {"image_size": 4, "features_per_image": 2}
"""How a processor differs from the plain one."""

SAMPLES: dict[str, list[tuple[Example, dict[str, Any]]]] = {
    "text": [
        (Document(("Two households, both alike in dignity",)), PLAIN),
        (Document(("a",)), PLAIN),
        (Chat((Message("user", ("Who?",)), Message("assistant", ("Romeo.",)))), PLAIN),
    ],
    "several images": [
        (Document((WIDE, TALL, "which is wider?", SMALL)), PLAIN),
        (Document((SQUARE, TALL, SQUARE, "the same twice")), PLAIN),
    ],
    "video": [
        (Document(("A clip: ", CLIP, "the end", TALL)), PLAIN),
        (Chat((Message("user", (CLIP, "What moves?")), Message("assistant", ("Nothing.",)))), PLAIN),
    ],
    "crops": [(Document((WIDE, "wide")), SPLIT), (Document((TALL, SQUARE, "tall")), SPLIT)],
    "squares of two sizes": [
        (Document((WIDE, "seen finely")), PLAIN),
        (Document((SQUARE, "seen coarsely, twice", WIDE)), COARSE),
    ],
    "weighted chat": [
        (
            Chat(
                (
                    Message("system", ("Be brief.",)),
                    Message("user", (SQUARE, "Is this ", SMALL, "?"), weight=0.5),
                    Message("assistant", ("No.",), weight=0.0),
                    Message("user", ("And this? ", CLIP)),
                    Message("assistant", ("Yes.",)),
                )
            ),
            PLAIN,
        ),
        (Chat((Message("assistant", ("Unasked.",), weight=0.5), Message("user", ("So?",)))), PLAIN),
    ],
}
SAMPLES["everything"] = [sample for kind in SAMPLES.values() for sample in kind]


@cache
def collator(changes: tuple[tuple[str, Any], ...] = ()) -> PackedCollator:
    sizes = {"image_size": 8, "min_image_size": 2, "patch_size": 2, "position_grid": 4}
    return PackedCollator(mini_processor(**(sizes | {"features_per_image": 5} | dict(changes))))


@cache
def encoded(kind: str) -> list[Sample]:
    """The samples of a kind, through a processor that the model of `mixed_layout` can read."""
    return [
        collator(tuple(changes.items())).encode(example, f"{kind}:{index}")
        for index, (example, changes) in enumerate(SAMPLES[kind])
    ]


def mixed_batch(*rows: Sequence[Sample], padding: int = 0) -> Batch:
    """The rows end to end; `padding` is how many tokens the longest row leaves free."""
    longest = max(sum(map(len, row)) for row in rows)
    return collator().collate([collator().row(row) for row in rows], longest + padding)


def mixed_layout(**changes: Any) -> AriaLayout:
    """`small_layout` with room for the embedded tokenizer."""
    layout = small_layout(**changes)
    return layout._replace(text=replace(layout.text, vocab_size=collator().processor.vocab_size))
