"""Rotary position embeddings in the rotate-half convention (Su et al., 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cantata.core.errors import ConfigError


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 and later slow the rotations that pretraining never saw whole (arXiv:2407.21783).

    Rotations longer than `original_max_position_embeddings / low_freq_factor` tokens are slowed by `factor`,
    those shorter than `original_max_position_embeddings / high_freq_factor` stay, and between the two the
    frequencies are mixed linearly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    """Tokens of the context before it was made longer."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"rope_scaling: factor ({self.factor}) and original_max_position_embeddings "
                f"({self.original_max_position_embeddings}) must be at least 1"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: low_freq_factor ({self.low_freq_factor}) must lie between 0 and "
                f"high_freq_factor ({self.high_freq_factor})"
            )

    def frequencies(self, base: Tensor) -> Tensor:
        """The frequencies, in radians per token, that stand for those of `base`."""
        turns = self.original_max_position_embeddings * base / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(base / self.factor, base, kept.clamp(0.0, 1.0))


class RotaryTables(NamedTuple):
    """Cosine and sine of each position's angles; made once per forward and shared by all layers."""

    cos_T1h: Tensor
    sin_T1h: Tensor


def rotary_tables(
    position_ids_T: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: Llama3Scaling | None = None,
) -> RotaryTables:
    """Tables of `position * theta^(-2i / head_dim)`, computed in fp32 and rounded once to `dtype`.

    The sine's first half carries the sign of the rotation, so that applying it needs no negation.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / head_dim
    frequencies = 1.0 / theta**exponent
    if scaling is not None:
        frequencies = scaling.frequencies(frequencies)
    angles = position_ids_T[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos_T1h = torch.cat((cos, cos), dim=-1)[:, None].to(dtype)
    sin_T1h = torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)
    return RotaryTables(cos_T1h, sin_T1h)


def rotate(x_THh: Tensor, tables: RotaryTables) -> Tensor:
    """Turn each pair (x_i, x_{i + h/2}) of every head by its position's angle."""
    first, second = x_THh.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(x_THh * tables.cos_T1h, swapped, tables.sin_T1h)
