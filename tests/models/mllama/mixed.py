"""Samples of every kind through the real processor and collator, for a small Mllama."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from cantata.core.samples import Sample
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator
from cantata.models.mllama import Masking, Mllama
from cantata.models.mllama.hf import MllamaLayout
from tests.models.aria.mixed import SAMPLES
from tests.models.mllama.small import small_mllama, small_processor, small_text, small_vision

IMAGE_TOKEN = 9
"""Of the package's tokenizer; within its vocabulary."""
KINDS = [kind for kind in SAMPLES if kind not in ("crops", "squares of two sizes")]


@cache
def collator() -> PackedCollator:
    return PackedCollator(small_processor())


@cache
def encoded(kind: str) -> list[Sample]:
    """The samples of a kind, as the model of `mixed_mllama` reads them."""
    return [collator().encode(example, f"{kind}:{index}") for index, (example, _) in enumerate(SAMPLES[kind])]


def mixed_batch(*rows: Sequence[Sample], padding: int = 0) -> Batch:
    """The rows end to end; `padding` is how many tokens the longest row leaves free."""
    longest = max(sum(map(len, row)) for row in rows)
    return collator().collate([collator().row(row) for row in rows], longest + padding)


def mixed_layout() -> MllamaLayout:
    """`small_layout` with room for the embedded tokenizer."""
    text = small_text(vocab_size=collator().processor.vocab_size)
    return MllamaLayout(small_vision(), text, IMAGE_TOKEN)


def mixed_mllama(masking: Masking = Masking.meta, seed: int = 0) -> Mllama:
    return small_mllama(mixed_layout(), masking, seed)
