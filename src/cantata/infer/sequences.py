"""Sequences that a model goes on with: with a cache, or without where a family has none.

B  sequences that go on together    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cantata.core import dist
from cantata.core.samples import Sample
from cantata.core.types import IGNORE_INDEX, TEXT, Batch, Images, Segments
from cantata.data.collate.packed import PackedCollator
from cantata.infer.kv_cache import KVCache
from cantata.models.protocol import Decodes, DecodingStep


class Sequences(Protocol):
    """The sequences of one batch, in order. Logits are those after each sequence's last token, (B, V)."""

    def add(self, prompts: Sequence[Sample]) -> Tensor:
        """Take in prompts behind those that are there; the logits of the new ones."""
        ...

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """One more token for every sequence; the logits of all."""
        ...

    def remove(self, index: int) -> None:
        """Drop a sequence; the last one takes its place."""
        ...


def open_sequences(model: nn.Module, collator: PackedCollator) -> Sequences:
    """With a cache where the model's family has one."""
    return (
        CachedSequences(model, collator) if isinstance(model, Decodes) else RepeatedSequences(model, collator)
    )


class CachedSequences:
    """Keys and values are kept: a new token runs one token of each sequence."""

    def __init__(self, model: nn.Module, collator: PackedCollator) -> None:
        self._model = model
        self._collator = collator
        self._cache = KVCache()

    def add(self, prompts: Sequence[Sample]) -> Tensor:
        """See `Sequences`. All prompts run packed, as in training, their images through the tower at once."""
        row = self._collator.row(prompts)
        batch = self._collator.collate([row], sum(row.lengths)).to(dist.device())
        return self._run(batch, self._cache.add(batch.samples, dist.device()))

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """See `Sequences`."""
        ids_B, positions_B = torch.tensor([list(tokens), self._cache.lengths]).to(dist.device())
        patch_values = self._collator.processor.patch_values
        batch = _one_token_each(ids_B, positions_B, patch_values)
        return self._run(batch, self._cache.extend(dist.device()))

    def remove(self, index: int) -> None:
        """See `Sequences`."""
        self._cache.remove(index)

    def _run(self, batch: Batch, step: DecodingStep) -> Tensor:
        # Compiled blocks would take the growing length for a dynamic shape, in training too.
        with torch.compiler.set_stance("force_eager"):
            logits_BV: Tensor = self._model(batch, step=step).logits_TV
        return logits_BV


class RepeatedSequences:
    """Nothing is kept: a new token runs the whole of every sequence again. Right, simple and slow."""

    def __init__(self, model: nn.Module, collator: PackedCollator) -> None:
        self._model = model
        self._collator = collator
        self._samples: list[Sample] = []

    def add(self, prompts: Sequence[Sample]) -> Tensor:
        """See `Sequences`."""
        self._samples += prompts
        return self._run(prompts)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """See `Sequences`."""
        self._samples = [_longer(*pair) for pair in zip(self._samples, tokens, strict=True)]
        return self._run(self._samples)

    def remove(self, index: int) -> None:
        """See `Sequences`."""
        last = self._samples.pop()
        if index < len(self._samples):
            self._samples[index] = last

    def _run(self, samples: Sequence[Sample]) -> Tensor:
        row = self._collator.row(samples)
        batch = self._collator.collate([row], sum(row.lengths)).to(dist.device())
        with torch.compiler.set_stance("force_eager"):
            logits_TV: Tensor = self._model(batch, with_logits=True).logits_TV
        return logits_TV[batch.samples.offsets(logits_TV.device)[1:].long() - 1]


def _one_token_each(ids_B: Tensor, positions_B: Tensor, patch_values: int) -> Batch:
    none = ids_B.new_empty(0)
    pixels = torch.empty((0, patch_values), dtype=torch.uint8, device=ids_B.device)
    return Batch(
        input_ids_T=ids_B,
        labels_T=torch.full_like(ids_B, IGNORE_INDEX),
        position_ids_T=positions_B,
        modality_ids_T=torch.full_like(ids_B, TEXT),
        target_index_N=none,
        target_modality_N=none,
        samples=Segments((1,) * len(ids_B)),
        images=Images(pixels, none, Segments(()), Segments(()), none),
    )


def _longer(sample: Sample, token: int) -> Sample:
    return replace(
        sample,
        input_ids_T=np.append(sample.input_ids_T, np.int32(token)),
        weight_T=np.append(sample.weight_T, np.float32(0)),
        modality_ids_T=np.append(sample.modality_ids_T, np.int8(TEXT)),
    )
