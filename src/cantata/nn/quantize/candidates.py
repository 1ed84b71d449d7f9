"""A fair draw among all rows of a step, whichever ranks and micro-batches they are in.

N  rows of a micro-batch    D  width of a row    C  rows that are drawn    W  ranks
"""

from __future__ import annotations

import torch
from torch import Tensor

from cantata.core.dist import all_reduce_sum, rank, world_size

_LAST = torch.iinfo(torch.int64).max
"""Priority of no row."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""An odd number near the golden ratio of 2^64, as the signed integer of the same bits."""


class CandidateRows:
    """Keeps the `limit` rows of the lowest priorities, and draws those of all ranks.

    The priority of a row is a random number that follows from three others: the step, the row's place in its
    micro-batch, and the micro-batch's place in the step, which is `(how many before it) * ranks + rank`. So
    the same rows in micro-batches of the same size give the same draw on any number of ranks. (Of rows of
    one priority the order of ranks would decide; they come once in some 1e19 pairs.)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._micro_batches = 0
        self._kept: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, rows_ND: Tensor, step: Tensor) -> None:
        """A micro-batch of this rank; the step is an int64 scalar on the device of the rows."""
        group = self._micro_batches * world_size() + (rank() if world_size() > 1 else 0)
        self._micro_batches += 1
        priority_N = _priorities(step, group, len(rows_ND))
        if self._kept is not None:
            rows_ND = torch.cat([self._kept[0], rows_ND])
            priority_N = torch.cat([self._kept[1], priority_N])
        priority_C, order_C = priority_N.topk(min(self._limit, len(priority_N)), largest=False)
        self._kept = rows_ND[order_C], priority_C

    @torch.no_grad()
    def take(self, like_D: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (C, D) in the order of their priorities and how many they are, alike on every rank.

        Starts the next step. Rows beyond that number are zeros. `like_D` has the width, device and dtype.
        """
        own, ranks, limit = (rank() if world_size() > 1 else 0), world_size(), self._limit
        rows_CD = like_D.new_zeros(limit, len(like_D))
        priority_WC = torch.zeros(ranks, limit, dtype=torch.int64, device=like_D.device)
        priority_WC[own] = _LAST
        if self._kept is not None:
            kept_ND, priority_N = self._kept
            rows_CD[: len(kept_ND)] = kept_ND
            priority_WC[own, : len(kept_ND)] = priority_N
        self._kept, self._micro_batches = None, 0
        priority_X = all_reduce_sum(priority_WC).flatten()
        order_C = priority_X.argsort(stable=True)[:limit]
        mine_C1 = (order_C // limit == own)[:, None]
        # Each row is a number on one rank and 0 on the others, so that the sum is exact.
        drawn_CD = all_reduce_sum(torch.where(mine_C1, rows_CD[order_C % limit], 0))
        return drawn_CD, (priority_X[order_C] < _LAST).sum()


def _priorities(step: Tensor, group: int, rows: int) -> Tensor:
    """Different ones for all rows of a group."""
    start = _mix(_mix(step) + group)
    return _mix(start + _GOLDEN * torch.arange(rows, device=step.device))


def _mix(x: Tensor) -> Tensor:
    """One draw of SplitMix64 (Steele et al. 2014): a bijection of 64 bits, in integers that wrap around.

    Made on the device from what is there, so that no value needs to be waited for, and alike on every one.
    """
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)
