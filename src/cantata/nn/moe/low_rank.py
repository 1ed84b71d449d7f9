"""What low-rank adapters (Hu et al., 2021, arXiv:2106.09685) add to the products of experts.

I  inputs of a product    O  its outputs    r  rank
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """`a @ b`, which is added to a weight and never made."""

    a: Tensor
    """(E, I, r), of one expert (I, r)."""
    b: Tensor
    """(E, r, O), of one expert (r, O)."""
    kept: Tensor | None
    """Which inputs count, bool: by token (N, D) for fc1, by row (R, F) for fc2; None: all. `b` holds whatever
    scales the others."""


Flat = Sequence[Tensor | None]
"""Nothing, or all of fc1's pair, then fc2's: operators take no deeper structure."""

T = TypeVar("T")


def pairs(low: Flat) -> tuple[LowRank | None, LowRank | None]:
    """What fc1 and fc2 get."""
    return (_pair(*low[:3]), _pair(*low[3:])) if low else (None, None)


def factors(low: Sequence[T]) -> list[T]:
    """Of something that is laid out as `Flat` is, what belongs to fc1's a and b and fc2's a and b."""
    return [*low[:2], *low[3:5]]


def kept_only(x: Tensor, kept: Tensor | None) -> Tensor:
    """`x`, zero where an input does not count."""
    # Processors widen bytes several times faster than truth values.
    return x if kept is None else x * kept.view(torch.uint8)


def _pair(a: Tensor | None, b: Tensor | None, kept: Tensor | None) -> LowRank | None:
    return None if a is None or b is None else LowRank(a, b, kept)
