"""A model whose losses can be written out by hand, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cantata.core.types import IGNORE_INDEX, PADDING, Batch, Images, ModelOutput, RouterStats, Segments
from cantata.nn.moe.router import count_by_modality

EXPERTS = 4
Sample = tuple[int, list[int]]
"""Modality and token ids."""


def pack(samples: Sequence[Sample], padding: int = 0) -> Batch:
    """Samples end to end; each token but the last of a sample has a target."""
    ids = [token for _, tokens in samples for token in tokens] + [0] * padding
    labels = [label for _, tokens in samples for label in (*tokens[1:], IGNORE_INDEX)]
    kinds = [modality for modality, tokens in samples for _ in tokens] + [PADDING] * padding
    labels_T = torch.tensor(labels + [IGNORE_INDEX] * padding, dtype=torch.int64)
    modality_T = torch.tensor(kinds, dtype=torch.int64)
    target_index_N = (labels_T != IGNORE_INDEX).nonzero().flatten()
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids_T=torch.tensor(ids, dtype=torch.int64),
        labels_T=labels_T,
        position_ids_T=torch.zeros_like(labels_T),
        modality_ids_T=modality_T,
        target_index_N=target_index_N,
        target_modality_N=modality_T[target_index_N],
        samples=Segments(tuple(len(tokens) for _, tokens in samples)),
        images=Images(torch.empty((0, 3)), empty, Segments(()), Segments(()), empty),
    )


class StandIn(nn.Module):
    """A target costs its label times the weight; layer l's z loss is (l + 1) times the mean token."""

    def __init__(self, with_router: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))
        self.with_router = with_router

    def forward(self, batch: Batch) -> ModelOutput:
        loss_N = self.weight * batch.labels_T[batch.target_index_N].float()
        router = self._router(batch) if self.with_router else None
        return ModelOutput(loss_N.sum(), loss_N.detach(), router, None)

    def _router(self, batch: Batch) -> RouterStats:
        total: Tensor = batch.input_ids_T[: batch.num_tokens].sum()
        z_sum_L = self.weight * total * torch.tensor([1.0, 2.0])
        expert_T1 = (batch.input_ids_T % EXPERTS)[:, None]
        counts_ME = count_by_modality(expert_T1, batch.modality_ids_T, EXPERTS)
        counts_LME = torch.stack([counts_ME, counts_ME])
        mass_LME = torch.zeros(counts_LME.shape)
        return RouterStats(mass_LME, z_sum_L, torch.zeros(2), counts_LME)
