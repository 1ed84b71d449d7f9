"""What several ranks hold, as one process would hold it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cantata.core.types import Batch, Images, Segments, StepTotals


def totals_of(batches: Sequence[Batch]) -> StepTotals:
    """The totals of a step made of these micro-batches."""
    sums = [(batch.num_tokens, batch.num_targets, batch.target_weight) for batch in batches]
    return StepTotals(*map(sum, zip(*sums, strict=True)))


def join(batches: Sequence[Batch]) -> Batch:
    """One micro-batch with the samples of all, without their padding.

    Balance losses are taken over the tokens of all ranks together, so this is what ranks are compared with.
    """
    starts, total = [], 0
    for batch in batches:
        starts.append(total)
        total += batch.num_tokens

    def tokens(name: str) -> Tensor:
        return torch.cat([getattr(batch, name)[: batch.num_tokens] for batch in batches])

    def shifted(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part + start for part, start in zip(parts, starts, strict=True)])

    images = [batch.images for batch in batches]
    weights = [batch.target_weight_N for batch in batches]
    if all(weight_N is None for weight_N in weights):
        weight_N = None
    else:
        ones = [torch.ones(batch.num_targets) for batch in batches]
        weight_N = torch.cat([one if w is None else w for w, one in zip(weights, ones, strict=True)])
    return Batch(
        input_ids_T=tokens("input_ids_T"),
        labels_T=tokens("labels_T"),
        position_ids_T=tokens("position_ids_T"),
        modality_ids_T=tokens("modality_ids_T"),
        target_index_N=shifted([batch.target_index_N for batch in batches]),
        target_modality_N=torch.cat([batch.target_modality_N for batch in batches]),
        samples=Segments.concatenate(batch.samples for batch in batches),
        images=Images(
            torch.cat([part.patches_PC for part in images]),
            torch.cat([part.position_ids_P for part in images]),
            Segments.concatenate(part.patches for part in images),
            Segments.concatenate(part.features for part in images),
            shifted([part.token_index_Q for part in images]),
            tuple(
                token + start
                for part, start in zip(images, starts, strict=True)
                for token in part.first_tokens
            ),
            Segments.concatenate(part.prefix for part in images if part.prefix is not None)
            if images[0].prefix is not None
            else None,
        ),
        target_weight_N=weight_N,
    )
