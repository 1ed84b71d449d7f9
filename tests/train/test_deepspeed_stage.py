"""Fragments: the part of a parameter that a rank's optimizer owns. The stages run in tests/distributed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cantata.train.deepspeed_stage import Fragment, Stage


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2), (1,), (9, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_fragment_reads_its_own_rows_only(shape: tuple[int, ...], world_size: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    size = -(-whole.numel() // world_size)
    for start in range(0, whole.numel(), size):
        fragment = Fragment(torch.empty(0), 0, start, min(size, whole.numel() - start))
        rows, within = fragment.rows(shape)
        part = whole[rows]
        assert torch.equal(part.reshape(-1)[within], fragment.within(whole))
        width = whole[0].numel()
        assert part.numel() < fragment.numel + 2 * width, "rows that the fragment does not touch"


def test_a_fragment_is_a_view_into_the_flat_tensor_and_its_states() -> None:
    flat, whole = torch.zeros(10), torch.arange(12.0).view(3, 4)
    fragment = Fragment(flat, start=2, parameter_start=5, numel=4)
    fragment.of(flat).copy_(fragment.within(whole))
    assert flat.tolist() == [0, 0, 5, 6, 7, 8, 0, 0, 0, 0]
    fragment.within(whole).zero_()
    assert whole.flatten().tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 11]


class OneRank(Stage):
    """A stage whose gradients lie at hand."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients

    def gradients(self) -> list[Tensor]:
        return self._gradients


def test_clipping_scales_to_the_norm_and_never_up() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    stage: Any = OneRank(gradients)
    assert stage.norm() == 5.0
    stage.clip(5.0, None)
    stage.clip(5.0, 10.0)
    assert gradients[0].tolist() == [3.0, 0.0]
    stage.clip(5.0, 1.0)
    assert stage.norm() == pytest.approx(1.0, rel=1e-6)


def test_squares_of_all_ranks_add_up() -> None:
    stage: Any = OneRank([torch.tensor([3.0])])
    with mock.patch("cantata.train.deepspeed_stage.all_reduce_sum", lambda values: [values[0] + 16.0]):
        assert stage.norm() == 5.0
