"""A small model that follows `models.protocol`: what plans and engines need, and no more.

Embedding -> blocks (norm, one matrix product, top-2 of 4 experts as a plain sum) -> tied or own head.
Row counts that two ranks do not divide, a frozen-able bias, a persistent and a derived buffer included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.types import Batch, Images, ModelOutput, RouterStats, Segments
from cantata.models.protocol import HubLayout, Unit
from tests.nn.moe.small import balance

VOCABULARY, HIDDEN, EXPERTS, TOP_K = 19, 12, 5, 2
BALANCE = balance(EXPERTS, z=1e-2)


class Stats(NamedTuple):
    z_sum: Tensor
    tokens_per_expert_E: Tensor


class Block(nn.Module):
    topk_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts_EDD = nn.Parameter(torch.empty(EXPERTS, HIDDEN, HIDDEN))
        self.register_buffer("expert_bias_E", torch.empty(EXPERTS, dtype=torch.float32))
        self.register_buffer("scale_D", torch.empty(HIDDEN), persistent=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Stats]:
        x_TD = x_TD + torch.sin(self.mix(self.norm(x_TD)))
        logits_TE = self.router(x_TD)
        _, index_TK = torch.topk(logits_TE.float() + self.expert_bias_E, TOP_K)
        weight_TK = logits_TE.gather(1, index_TK).float().softmax(-1).to(x_TD.dtype)
        out_TED = torch.einsum("td,edf->tef", x_TD, self.experts_EDD) * self.scale_D.to(x_TD.dtype)
        chosen_TKD = out_TED.gather(1, index_TK[..., None].expand(-1, -1, HIDDEN))
        count_E = F.one_hot(index_TK, EXPERTS).sum((0, 1))
        stats = Stats(logits_TE.float().logsumexp(-1).square().sum(), count_E)
        return x_TD + (chosen_TKD * weight_TK[..., None]).sum(1), stats


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.output(self.norm(x_TD)).float()


class StandIn(nn.Module):
    def __init__(self, tied: bool = False, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = Head()
        self.logit_scale = nn.Parameter(torch.empty(1))
        if tied:
            self.head.output.weight = self.embedding.weight

    def forward(self, batch: Batch, *, with_logits: bool = False) -> ModelOutput:
        x_TD = self.embedding(batch.input_ids_T)
        stats = []
        for block in self.blocks:
            x_TD, block_stats = block(x_TD)
            stats.append(block_stats)
        logits_NV = self.head(x_TD)[batch.target_index_N] * self.logit_scale.float()
        loss_N = F.cross_entropy(logits_NV, batch.labels_T[batch.target_index_N], reduction="none")
        z_sum_L = torch.stack([item.z_sum for item in stats])
        counts_LE = torch.stack([item.tokens_per_expert_E for item in stats])
        counts_LME = torch.stack([counts_LE, *[torch.zeros_like(counts_LE)] * 2], dim=1)
        router = RouterStats(torch.zeros(counts_LME.shape), z_sum_L, torch.zeros(len(stats)), counts_LME)
        return ModelOutput(loss_N.sum(), loss_N.detach(), router, logits_NV if with_logits else None)

    def units(self) -> Sequence[Unit]:
        return [
            Unit("embedding", self.embedding, is_block=False),
            *(Unit(f"blocks.{index}", block, is_block=True) for index, block in enumerate(self.blocks)),
            Unit("head", self.head, is_block=False),
        ]

    def moe_layers(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name.endswith(("norm.weight", "logit_scale", "scale_D")):
            tensor.fill_(1.0)
        elif name.endswith("expert_bias_E"):
            tensor.zero_()
        else:
            tensor.normal_(std=0.3, generator=generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        return 0.0

    def hub_layout(self) -> HubLayout:
        raise NotImplementedError


def build_on_meta(tied: bool = False, blocks: int = 2) -> StandIn:
    with torch.device("meta"):
        return StandIn(tied, blocks)


def make_batch(tokens: int, seed: int) -> Batch:
    """Random tokens; every third position carries no target."""
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    labels_T = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    labels_T[::3] = -100
    index_N = (labels_T != -100).nonzero()[:, 0]
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids_T=ids_T,
        labels_T=labels_T,
        position_ids_T=torch.arange(tokens),
        modality_ids_T=torch.zeros(tokens, dtype=torch.int64),
        target_index_N=index_N,
        target_modality_N=torch.zeros_like(index_N),
        samples=Segments((tokens,)),
        images=Images(torch.empty(0, 3), empty, Segments(()), Segments(()), empty),
    )
