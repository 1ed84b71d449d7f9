"""Rows of all ranks and their gradients, by ranks that are threads; gloo's are in `tests/distributed`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cantata.core import gather
from cantata.core.gather import gather_rows


class Threads:
    """The two collectives that gathering needs, among threads that each are a rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._own = threading.local()
        self._barrier = threading.Barrier(size)
        self._given: list[Tensor] = [torch.empty(0)] * size

    def become(self, rank: int) -> None:
        self._own.rank = rank

    def rank(self) -> int:
        found: int = self._own.rank
        return found

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self._exchanged(tensor)).sum(0))

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        for part, given in zip(parts, self._exchanged(tensor), strict=True):
            part.copy_(given)

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        self._given[self.rank()] = tensor.clone()
        self._barrier.wait(30)
        found = list(self._given)
        self._barrier.wait(30)
        return found


class Found(NamedTuple):
    rows: Tensor
    start: int
    gradient: Tensor


@pytest.mark.parametrize("counts", [(2, 3), (3, 0), (0, 0), (1, 0, 4), (0, 2, 2)])
@pytest.mark.parametrize("width", [(4,), (), (2, 3)])
def test_as_if_one_process_held_every_row(
    counts: tuple[int, ...], width: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of each rank reads all rows, with weights of its own; the last rank has none."""
    ranks, generator = Threads(len(counts)), torch.Generator().manual_seed(0)
    monkeypatch.setattr(gather, "dist", ranks)
    monkeypatch.setattr(gather, "world_size", lambda: ranks.size)
    monkeypatch.setattr(gather, "rank", ranks.rank)
    whole = torch.randn(sum(counts), *width, generator=generator)
    weights = torch.randn(len(counts), *whole.shape, generator=generator)
    weights[-1] = 0.0

    def run(rank: int) -> Found:
        ranks.become(rank)
        own = whole.split(counts)[rank].clone().requires_grad_()
        rows, start = gather_rows(own)
        (rows.square() * weights[rank]).sum().backward()
        assert own.grad is not None
        return Found(rows.detach(), start, own.grad)

    with ThreadPoolExecutor(len(counts)) as threads:
        found = list(threads.map(run, range(len(counts))))
    expected = (2 * whole * weights.sum(0)).split(counts)
    for rank, one in enumerate(found):
        assert torch.equal(one.rows, whole)
        assert one.start == sum(counts[:rank])
        torch.testing.assert_close(one.gradient, expected[rank], rtol=0, atol=1e-6)


def test_one_rank_gathers_its_own() -> None:
    x_nD = torch.randn(3, 4, requires_grad=True)
    assert gather_rows(x_nD) == (x_nD, 0)
