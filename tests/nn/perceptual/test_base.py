"""How feature maps are compared, position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.nn.perceptual.base import unit, unit_distance


def maps(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = ((2, 3, 4, 5), (2, 6, 2, 2))


def slow(x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    found = torch.zeros(len(x))
    rows, columns = x.shape[2:]
    for image in range(len(x)):
        for row in range(rows):
            for column in range(columns):
                a, b = x[image, :, row, column], y[image, :, row, column]
                square = (a / a.norm() - b / b.norm()) ** 2
                found[image] += (square if weight is None else square * weight).sum() / (rows * columns)
    return found


def test_a_distance_is_a_mean_over_positions_of_unit_differences() -> None:
    x, y = maps(*SHAPES), maps(*SHAPES, seed=1)
    weights = [None, torch.rand(6, generator=torch.Generator().manual_seed(2))]
    for found, *given in zip(unit_distance(x, y, weights), x, y, weights, strict=True):
        torch.testing.assert_close(found, slow(*given), rtol=1e-5, atol=1e-6)


def test_length_does_not_count_and_an_image_is_no_distance_from_itself() -> None:
    x, y = maps(*SHAPES), maps(*SHAPES, seed=1)
    near = unit_distance([3 * one for one in x], y, [None, None])
    for one, other in zip(near, unit_distance(x, y, [None, None]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert all(not one.any() for one in unit_distance(x, x, [None, None]))


def test_a_position_of_zeros_has_a_gradient() -> None:
    """Where ReLU has put everything to 0, the root's own would be infinite."""
    x_BCHW = torch.zeros(1, 3, 2, 2).requires_grad_()
    found = unit(x_BCHW)
    assert not found.any()
    found.sum().backward()
    assert x_BCHW.grad is not None
    assert x_BCHW.grad.isfinite().all()


def test_as_many_maps_as_weights() -> None:
    x = maps(*SHAPES)
    with pytest.raises(ValueError, match="shorter"):
        unit_distance(x, x, [None])
