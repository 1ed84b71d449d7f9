"""AIMv2's image encoder over packed patches, and the head that pools an image into one feature.

P  patches of all images    I  images    D  hidden size    C  values of a patch    h  head dimension
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cantata.core.types import Images, Segments
from cantata.models.aimv2.block import Block
from cantata.models.aimv2.config import Aimv2VisionConfig
from cantata.nn.attention import PackedAttention
from cantata.nn.matmul import Linear
from cantata.nn.norm import RMSNorm

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue from 0 to 1: CLIP's, as AIMv2's published processors have them."""

_TEMPERATURE = 10000.0


def normalised_patches(patches_PC: Tensor) -> Tensor:
    """Patches as the encoder takes them: uint8 becomes fp32 with CLIP's mean and deviation, floats stay."""
    if patches_PC.dtype != torch.uint8:
        return patches_PC
    channels = len(PIXEL_MEAN)
    mean_3, std_3 = (
        torch.tensor(values, device=patches_PC.device).repeat_interleave(patches_PC.shape[1] // channels)
        for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return (patches_PC.float() / 255.0 - mean_3) / std_3


def sincos_positions(position_ids_P: Tensor, grid: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """[sin | cos] of the column, then of the row, at `hidden_size / 4` frequencies each: (P, D).

    Sines of MAE's making (He et al., 2022, arXiv:2111.06377), which puts columns first. Angles are fp64.
    """
    quarter = hidden_size // 4
    exponent = torch.arange(quarter, dtype=torch.float64, device=position_ids_P.device) / quarter
    frequencies = 1.0 / _TEMPERATURE**exponent
    parts = []
    for place_P in (position_ids_P % grid, position_ids_P // grid):
        angles = place_P.double()[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).to(dtype)


class PatchEmbedding(nn.Module):
    """Pixels of a patch through a linear layer and an RMSNorm, plus the position."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.patch_embed = Linear(config.patch_values, config.hidden_size)
        self.rms_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        learned = None if config.is_native else nn.Embedding(config.grid**2, config.hidden_size)
        self.position_embedding = learned

    def forward(self, patches_PC: Tensor, position_ids_P: Tensor) -> Tensor:
        patches_PC = normalised_patches(patches_PC).to(self.patch_embed.weight.dtype)
        x_PD: Tensor = self.rms_norm(self.patch_embed(patches_PC))
        if self.position_embedding is None:
            return x_PD + sincos_positions(position_ids_P, self.grid, x_PD.shape[1], x_PD.dtype)
        positions_PD: Tensor = self.position_embedding(position_ids_P)
        return x_PD + positions_PD


class PoolingHead(nn.Module):
    """A learned query for each head reads an image's features: one feature an image, (I, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cls_token = nn.Parameter(torch.empty(hidden_size))
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = Linear(hidden_size, hidden_size, bias=False)
        self.output_proj = Linear(hidden_size, hidden_size)

    def forward(self, x_PD: Tensor, patches: Segments) -> Tensor:
        images, size = len(patches.lengths), x_PD.shape[1]
        head = (self.num_heads, size // self.num_heads)
        query = self.cls_token.expand(images, size).reshape(images, *head).to(x_PD.dtype)
        keys, values = (proj(x_PD).view(len(x_PD), *head) for proj in (self.k_proj, self.v_proj))
        pooled = PackedAttention(Segments((1,) * images), patches, causal=False)(query, keys, values)
        return self.output_proj(pooled.flatten(-2))


class VisionTower(nn.Module):
    """Patches to features: the blocks' output behind the final norm.

    In pretraining an image's first patches see each other, later ones those before them alone; how many they
    are says `images.prefix`. Elsewhere it is None, and all see each other.
    """

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
        self.embeddings = PatchEmbedding(config)
        self.layers = nn.ModuleList(
            Block(*sizes, config.rms_norm_eps) for _ in range(config.num_hidden_layers)
        )
        self.rms_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = PoolingHead(config.hidden_size, config.num_attention_heads) if config.use_head else None

    def forward(self, images: Images) -> Tensor:
        """Features of all patches, (P, D)."""
        attend = PackedAttention(images.patches, causal=images.prefix is not None, prefix=images.prefix)
        x_PD: Tensor = self.embeddings(images.patches_PC, images.position_ids_P)
        for layer in self.layers:
            x_PD = layer(x_PD, attend)
        features_PD: Tensor = self.rms_norm(x_PD)
        return features_PD

    def pooled(self, images: Images) -> Tensor:
        """The head's feature of each image, (I, D)."""
        assert self.head is not None
        pooled_ID: Tensor = self.head(self(images), images.patches)
        return pooled_ID
