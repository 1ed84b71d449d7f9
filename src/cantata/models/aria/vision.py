"""Aria's vision tower: a SigLIP-shaped ViT over packed patches of images of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cantata.core.types import Images
from cantata.models.aria.config import AriaVisionConfig
from cantata.nn.attention import PackedAttention
from cantata.nn.matmul import Linear
from cantata.nn.mlp import GELU


def patch_position_ids(rows: int, columns: int, grid: int) -> Tensor:
    """Position ids of an image of rows x columns patches in a grid x grid table, row by row: int64.

    Each side is stretched over the whole grid: patch i of n takes the bucket that holds i / n (the
    fractional coordinates of NaViT, as Idefics2 uses them). The fp32 arithmetic is part of the format:
    it decides which bucket a coordinate on a boundary falls into.
    """
    boundaries = torch.arange(1 / grid, 1.0, 1 / grid)
    row_ids, column_ids = (_buckets(count, boundaries) for count in (rows, columns))
    return (row_ids[:, None] * grid + column_ids).flatten()


def _buckets(count: int, boundaries: Tensor) -> Tensor:
    step = 1.0 / torch.tensor(count)
    coordinates = (torch.arange(count, dtype=torch.float32) * step).clamp_max(1.0 - 1e-6)
    return torch.bucketize(coordinates, boundaries, right=True)


class PatchEmbedding(nn.Module):
    """Pixels of a patch through a linear layer, plus the learned position."""

    def __init__(self, config: AriaVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.patch_values, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)

    def forward(self, patches_PC: Tensor, position_ids_P: Tensor) -> Tensor:
        if patches_PC.dtype == torch.uint8:
            patches_PC = patches_PC.float().div_(127.5).sub_(1.0)
        weight = self.patch_embedding.weight
        positions_PD: Tensor = self.position_embedding(position_ids_P)
        return self.patch_embedding(patches_PC.to(weight.dtype)) + positions_PD


class VisionAttention(nn.Module):
    """Bidirectional attention inside each image."""

    def __init__(self, config: AriaVisionConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PD: Tensor, attend: PackedAttention) -> Tensor:
        heads = (len(x_PD), x_PD.shape[-1] // self.head_dim, self.head_dim)
        q, k, v = (proj(x_PD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).flatten(-2))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: AriaVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GELU(config.hidden_size, config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x_PD: Tensor, attend: PackedAttention) -> Tensor:
        x_PD = x_PD + self.self_attn(self.layer_norm1(x_PD), attend)
        y_PD: Tensor = self.mlp(self.layer_norm2(x_PD))
        return x_PD + y_PD


class VisionTower(nn.Module):
    """Patches to features: the output of the last block, before `post_layernorm`.

    That norm never runs; it is kept, frozen, because published checkpoints hold it.
    """

    def __init__(self, config: AriaVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(config)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_layernorm.requires_grad_(False)

    def forward(self, images: Images) -> Tensor:
        attend = PackedAttention(images.patches, causal=False)
        x_PD: Tensor = self.embeddings(images.patches_PC, images.position_ids_P)
        for layer in self.layers:
            x_PD = layer(x_PD, attend)
        return x_PD
