"""Mllama's vision tower: a ViT over tiles, with attention that needs no mask.

    I  images    M  tiles of an image, padded    N  positions of a tile    P  patches of all real tiles
    X  positions of a micro-batch: first the real ones of all images, then all that is padding

Each image is padded to M tiles, and each tile to N positions rounded up. In the published model real
positions attend to padding too, so it cannot be left out; but padding does not attend to padding. Both are
attention without a mask, of two sets of queries to two sets of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cantata.core.types import Images, Segments
from cantata.models.mllama.config import MllamaVisionConfig
from cantata.nn.attention import PackedAttention
from cantata.nn.matmul import Linear
from cantata.nn.mlp import GELU
from cantata.nn.rows import take_rows


class TileLayout:
    """Where the positions of a micro-batch's images lie; made once per forward, from host-side counts.

    Args:
        config: of the tower.
        tiles: real tiles of each image.
        device: of the tower.
    """

    def __init__(self, config: MllamaVisionConfig, tiles: Sequence[int], device: torch.device) -> None:
        real, padded, most = config.positions, config.padded_positions, config.max_num_tiles
        # By numpy on the host: nothing here may look at values of tensors (see `train.dry_run`).
        place_IMN = np.arange(len(tiles) * most * padded).reshape(len(tiles), most, padded)
        is_real_IM = np.arange(most) < np.array(tiles, dtype=np.int64)[:, None]
        is_real_IMN = is_real_IM[:, :, None] & (np.arange(padded) < real)
        order_X = np.concatenate((place_IMN[is_real_IMN], place_IMN[~is_real_IMN]))
        lengths = tuple(count * real for count in tiles)
        total = most * padded
        self.num_real = sum(lengths)
        self.real = Segments(lengths)
        self.order_X = _on(order_X, device)
        """From rows laid out here to those of (I, M, N)."""
        self.back_X = _on(np.argsort(order_X), device)
        """From rows of (I, M, N) to those laid out here."""
        self.tile_index = _on(np.flatnonzero(is_real_IM), device)
        """Of each real tile, its place among (I, M)."""
        everything = Segments((total,) * len(tiles))
        padding = Segments(tuple(total - length for length in lengths))
        self._attend_real = PackedAttention(self.real, everything, causal=False)
        self._attend_padding = PackedAttention(padding, self.real, causal=False)

    # A compiled block would be compiled again for every new layout of images.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q_XHh: Tensor, k_XHh: Tensor, v_XHh: Tensor) -> Tensor:
        """The attended values: of all positions, or of the real ones alone if the queries are theirs."""
        # Keys image by image: the place of each of its positions.
        k, v = take_rows(k_XHh, self.back_X), take_rows(v_XHh, self.back_X)
        if len(q_XHh) == self.num_real:
            kept: Tensor = self._attend_real(q_XHh, k, v)
            return kept
        real, padding = torch.split(q_XHh, [self.num_real, len(q_XHh) - self.num_real])
        read = (k_XHh[: self.num_real], v_XHh[: self.num_real])
        return torch.cat((self._attend_real(real, k, v), self._attend_padding(padding, *read)))


class TilePosition(nn.Module):
    """A learned, gated vector for each tile of each canvas."""

    def __init__(self, config: MllamaVisionConfig, num_canvases: int) -> None:
        super().__init__()
        self.max_num_tiles = config.max_num_tiles
        self.embedding = nn.Embedding(num_canvases + 1, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, canvas_I: Tensor) -> Tensor:
        """(I, M, 1, D)."""
        embedded_IX: Tensor = self.embedding(canvas_I) * self.gate.tanh()
        size = embedded_IX.shape[-1] // self.max_num_tiles
        return embedded_IX.view(len(canvas_I), self.max_num_tiles, 1, size)


class Embeddings(nn.Module):
    """Pixels of patches to the positions of all tiles, padding included, (I, M, N, D)."""

    def __init__(self, config: MllamaVisionConfig, num_canvases: int) -> None:
        super().__init__()
        self.config = config
        size = config.max_num_tiles * config.positions * config.hidden_size
        self.patch_embedding = Linear(config.patch_values, config.hidden_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.tile_position = TilePosition(config, num_canvases)
        self.position = nn.Parameter(torch.empty(config.positions, config.hidden_size))
        self.canvas_position = nn.Embedding(num_canvases + 1, size)
        self.position_gate = nn.Parameter(torch.zeros(1))
        self.layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, patches_PC: Tensor, canvas_I: Tensor, layout: TileLayout) -> Tensor:
        config, weight = self.config, self.patch_embedding.weight
        if patches_PC.dtype == torch.uint8:
            patches_PC = self._normalised(patches_PC)
        images, most, size = len(canvas_I), config.max_num_tiles, config.hidden_size
        real = self.patch_embedding(patches_PC.to(weight.dtype)).view(-1, config.patches, size)
        tiles = real.new_zeros(images * most, config.patches, size).index_copy(0, layout.tile_index, real)
        x = tiles.view(images, most, config.patches, size) + self.tile_position(canvas_I)
        x = torch.cat((self.class_embedding.to(x.dtype).expand(images, most, 1, size), x), dim=2)
        gate = self.position_gate.tanh()
        placed: Tensor = self.canvas_position(canvas_I).view(x.shape)
        x = self.layernorm(x + (1 - gate) * self.position + gate * placed)
        return F.pad(x, (0, 0, 0, config.padded_positions - config.positions))

    def _normalised(self, patches_PC: Tensor) -> Tensor:
        channels, area = self.config.num_channels, self.config.patch_size**2
        pixels = patches_PC.float().div_(255.0).view(len(patches_PC), channels, area)
        for channel, values in enumerate(zip(self.config.image_mean, self.config.image_std, strict=True)):
            pixels[:, channel].sub_(values[0]).div_(values[1])
        return pixels.flatten(1)


class VisionAttention(nn.Module):
    """Attention inside each image, without biases."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.q_proj = Linear(size, size, bias=False)
        self.k_proj = Linear(size, size, bias=False)
        self.v_proj = Linear(size, size, bias=False)
        self.o_proj = Linear(size, size, bias=False)

    def forward(self, x_XD: Tensor, attend: TileLayout, kept: int | None = None) -> Tensor:
        """What the first `kept` positions read, or all."""
        heads = (-1, x_XD.shape[-1] // self.head_dim, self.head_dim)
        inputs = ((self.q_proj, x_XD[:kept]), (self.k_proj, x_XD), (self.v_proj, x_XD))
        q, k, v = (proj(x).view(heads) for proj, x in inputs)
        return self.o_proj(attend(q, k, v).flatten(-2))


class VisionBlock(nn.Module):
    """Pre-norm transformer block; a gated one scales what it adds by the tanh of two learned numbers."""

    gate_attn: nn.Parameter | None
    gate_ffn: nn.Parameter | None

    def __init__(self, config: MllamaVisionConfig, *, gated: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = GELU(size, config.intermediate_size, size, bias=True, approximate="none")
        for name in ("gate_attn", "gate_ffn"):
            self.register_parameter(name, nn.Parameter(torch.full((1,), math.pi / 4)) if gated else None)

    def forward(self, x_XD: Tensor, attend: TileLayout, kept: int | None = None) -> Tensor:
        """The first `kept` positions, or all."""
        y_XD: Tensor = self.self_attn(self.input_layernorm(x_XD), attend, kept)
        x_XD = x_XD[:kept] + (y_XD if self.gate_attn is None else self.gate_attn.tanh() * y_XD)
        y_XD = self.mlp(self.post_attention_layernorm(x_XD))
        return x_XD + (y_XD if self.gate_ffn is None else self.gate_ffn.tanh() * y_XD)


class Between(nn.Module):
    """What stands between the layers that see a tile's place and those behind them: a norm and that place."""

    def __init__(self, config: MllamaVisionConfig, num_canvases: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size)
        self.tile_position = TilePosition(config, num_canvases)

    def forward(self, x_XD: Tensor, canvas_I: Tensor, layout: TileLayout, positions: int) -> Tensor:
        place_IMD: Tensor = self.tile_position(canvas_I).expand(-1, -1, positions, -1).flatten(0, 2)
        normed_XD: Tensor = self.layernorm(x_XD)
        return normed_XD + place_IMD.index_select(0, layout.order_X)


class TowerOutput(NamedTuple):
    """Features of all images, each image's real ones first."""

    features_FC: Tensor
    """(features, (1 + intermediate layers) * hidden size): the last layer's, then the others' interleaved."""
    features: Segments
    """Of each image."""
    readable: tuple[int, ...]
    """Of each image: how many belong to real tiles."""


class VisionTower(nn.Module):
    """Patches of tiles to features.

    num_canvases: grids of tiles that there are learned positions for.
    """

    def __init__(self, config: MllamaVisionConfig, num_canvases: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, num_canvases)
        self.layers = nn.ModuleList(VisionBlock(config, gated=False) for _ in range(config.num_hidden_layers))
        self.between = Between(config, num_canvases)
        self.global_layers = nn.ModuleList(
            VisionBlock(config, gated=True) for _ in range(config.num_global_layers)
        )

    def forward(self, images: Images, *, padded_tiles: bool) -> TowerOutput:
        """Features of the real tiles, or with `padded_tiles` those of all, behind the real ones.

        Raises `ValueError` for an image that is no whole number of tiles, or of too many.
        """
        config = self.config
        tiles = [self._tiles(count) for count in images.patches.lengths]
        layout = TileLayout(config, tiles, images.patches_PC.device)
        canvas_I = canvases_of(images, config)
        x_IMND = self.embeddings(images.patches_PC, canvas_I, layout)
        x_XD = take_rows(x_IMND.flatten(0, 2), layout.order_X)
        kept = None if padded_tiles else layout.num_real
        outputs = {}
        for index, layer in enumerate(self.layers):
            x_XD = layer(x_XD, layout)
            if index in config.intermediate_layers:
                outputs[index] = x_XD[:kept]
        x_XD = self.between(x_XD, canvas_I, layout, config.padded_positions)
        for number, layer in enumerate(self.global_layers, start=1):
            # Of the last one's outputs, those of padding are features of nothing.
            x_XD = layer(x_XD, layout, kept if number == len(self.global_layers) else None)
        between = torch.stack([outputs[index] for index in config.intermediate_layers], dim=-1).flatten(-2)
        features_FC = torch.cat((x_XD[:kept], between), dim=-1)
        if not padded_tiles:
            return TowerOutput(features_FC, layout.real, layout.real.lengths)
        # Without the positions that fill up tiles; an image's real tiles are its first.
        is_kept_X = np.arange(len(layout.order_X)) % config.padded_positions < config.positions
        rows_F = layout.back_X.index_select(0, _on(np.flatnonzero(is_kept_X), layout.back_X.device))
        features = Segments((config.max_num_tiles * config.positions,) * len(tiles))
        return TowerOutput(features_FC.index_select(0, rows_F), features, layout.real.lengths)

    def _tiles(self, patches: int) -> int:
        tiles, rest = divmod(patches, self.config.patches)
        if rest or not 1 <= tiles <= self.config.max_num_tiles:
            raise ValueError(
                f"an image of {patches} patches; a tile has {self.config.patches}, and an image 1 to "
                f"{self.config.max_num_tiles} tiles"
            )
        return tiles


def _on(index: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.tensor(index, dtype=torch.int64).to(device, non_blocking=True)


def position_id(canvas_id: int, config: MllamaVisionConfig) -> int:
    """The position id of the first patch of an image on a canvas; those of its other patches follow."""
    return canvas_id * config.max_num_tiles * config.patches


def canvases_of(images: Images, config: MllamaVisionConfig) -> Tensor:
    """The canvas of each image, int64, (I,): what its first patch's position id says."""
    first_I = images.patches.offsets(images.position_ids_P.device)[:-1]
    ids_I = images.position_ids_P.index_select(0, first_I)
    return ids_I.div(config.max_num_tiles * config.patches, rounding_mode="floor")
