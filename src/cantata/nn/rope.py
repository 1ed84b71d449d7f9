"""Rotary position embeddings in the rotate-half convention (Su et al., 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTables(NamedTuple):
    """Cosine and sine of each position's angles; made once per forward and shared by all layers."""

    cos_T1h: Tensor
    sin_T1h: Tensor


def rotary_tables(position_ids_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> RotaryTables:
    """Tables of `position * theta^(-2i / head_dim)`, computed in fp32 and rounded once to `dtype`.

    The sine's first half carries the sign of the rotation, so that applying it needs no negation.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / head_dim
    angles = position_ids_T[:, None].float() * (1.0 / theta**exponent)
    cos, sin = angles.cos(), angles.sin()
    cos_T1h = torch.cat((cos, cos), dim=-1)[:, None].to(dtype)
    sin_T1h = torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)
    return RotaryTables(cos_T1h, sin_T1h)


def rotate(x_THh: Tensor, tables: RotaryTables) -> Tensor:
    """Turn each pair (x_i, x_{i + h/2}) of every head by its position's angle."""
    first, second = x_THh.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(x_THh * tables.cos_T1h, swapped, tables.sin_T1h)
