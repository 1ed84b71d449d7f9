"""What one adapter is, and what of its inputs counts while training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DRAWN_AT_ONCE = 2**16
"""Random numbers of 16 bits that exist at a time on the CPU: what its cache holds."""


@dataclass(frozen=True)
class LoRASettings:
    """Of one weight's adapter (Hu et al., 2021, arXiv:2106.09685)."""

    r: int
    """Rank: the inner size of its two factors."""
    alpha: float
    dropout: float
    """Share of A's inputs that are zeroed while training; the others grow by `1 / (1 - dropout)`.

    An embedding's A has no inputs that could be zeroed: it looks up.
    """
    rslora: bool
    """Scale by alpha / sqrt(r) (Kalajdzievski, 2023, arXiv:2312.03732) instead of alpha / r."""
    dora: bool
    """Learn each output's norm by itself (Liu et al., 2024, arXiv:2402.09353), linears only."""

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def draw_kept(self, shape: Sequence[int], device: torch.device, training: bool) -> Tensor | None:
        """Which inputs count, bool, from the default generator; None: all."""
        return draw_kept(shape, device, self.dropout) if training and self.dropout > 0 else None

    def scale(self, kept: Tensor | None) -> float:
        """`scaling`, and what makes up for the inputs that do not count."""
        return self.scaling if kept is None else self.scaling / (1 - self.dropout)


def draw_kept(shape: Sequence[int], device: torch.device, dropout: float) -> Tensor:
    """True with probability `1 - dropout` (on the CPU to 16 bits)."""
    kept = torch.empty(shape, dtype=torch.bool, device=device)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return kept.bernoulli_(1 - dropout)
    # Torch draws each Bernoulli number from its own 64 bits; four from them are three times as fast.
    drawn = torch.empty(_DRAWN_AT_ONCE // 4, dtype=torch.int64)
    lowest, words = round(dropout * 2**16) - 2**15, drawn.view(torch.int16)
    for part in torch.split(kept.view(-1), _DRAWN_AT_ONCE):
        drawn.random_(-(2**63), None)
        torch.ge(words[: len(part)], lowest, out=part)
    return kept
