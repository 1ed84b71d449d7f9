"""Aria's projector: learned queries turn an image's patches into a fixed number of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cantata.core.types import Segments
from cantata.models.aria.config import AriaProjectorConfig
from cantata.nn.attention import PackedAttention
from cantata.nn.matmul import Linear, linear
from cantata.nn.mlp import GELU


class QueryAttention(nn.Module):
    """Cross attention with two projections in a row for each of q, k and v.

    The first is bias-free, the second is the fused `in_proj` of a standard multi-head attention. Both
    are Aria's; neither can be dropped, because its checkpoints hold both.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.layer_norm_kv = nn.LayerNorm(hidden_size)
        self.q_proj = Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = Linear(hidden_size, hidden_size, bias=False)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = Linear(hidden_size, hidden_size)
        self.linear = Linear(hidden_size, hidden_size)

    def forward(self, queries_QD: Tensor, x_PD: Tensor, attend: PackedAttention) -> Tensor:
        x_PD = self.layer_norm_kv(x_PD)
        inputs = (self.q_proj(self.layer_norm(queries_QD)), self.k_proj(x_PD), self.v_proj(x_PD))
        second = zip(inputs, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (linear(*args).view(-1, self.num_heads, self.head_dim) for args in second)
        return self.linear(self.out_proj(attend(q, k, v).flatten(-2)))


class Projector(nn.Module):
    """The first n queries of each image attend to its patches; no residual; then a GELU block."""

    def __init__(self, config: AriaProjectorConfig, vision_size: int, num_heads: int, text_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.num_queries, vision_size))
        self.cross_attn = QueryAttention(vision_size, num_heads)
        self.layer_norm = nn.LayerNorm(vision_size)
        self.feed_forward = GELU(vision_size, text_size, text_size, bias=False)

    def forward(self, x_PD: Tensor, patches: Segments, features: Segments) -> Tensor:
        """Features of all images, (Q, text hidden size).

        patches: patches of each image. features: queries that each image gets.
        """
        index_Q = torch.tensor([i for n in features.lengths for i in range(n)], dtype=torch.int64)
        queries_QD = self.query.index_select(0, index_Q.to(x_PD.device, non_blocking=True))
        attend = PackedAttention(features, patches, causal=False)
        features_QD: Tensor = self.feed_forward(self.layer_norm(self.cross_attn(queries_QD, x_PD, attend)))
        return features_QD
