"""Gradients that pass a quantiser, and means over rows, against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.nn.quantize import common
from cantata.nn.quantize.common import entropy_of_mean, fp32, rotated, squared_error, straight_through, unit
from tests.nn.quantize.small import close


def rows(count: int, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pass_on", [straight_through, rotated])
def test_the_values_are_those_of_the_codes_bit_for_bit(pass_on: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Of large latents too, where `z + (values - z)` would round."""
    z_ND, values_ND = 1e4 * rows(50), rows(50, seed=1)
    assert torch.equal(pass_on(z_ND.requires_grad_(), values_ND), values_ND)


def test_straight_through_is_the_identity_backwards() -> None:
    z_ND, values_ND, grad_ND = rows(5).requires_grad_(), rows(5, seed=1).requires_grad_(), rows(5, seed=2)
    straight_through(z_ND, values_ND).backward(grad_ND)
    assert torch.equal(z_ND.grad, grad_ND)
    assert values_ND.grad is None


def test_a_rotated_gradient_keeps_its_angle_to_the_row() -> None:
    """A turn and a scale lead from a row to its code; a gradient comes back by the same."""
    z_ND, values_ND, grad_ND = rows(6).double(), rows(6, seed=1).double(), rows(6, seed=2).double()
    z_ND.requires_grad_()
    rotated(z_ND, values_ND).backward(grad_ND)
    for z, value, grad, found in zip(z_ND.detach(), values_ND, grad_ND, z_ND.grad, strict=True):
        a, b = z / z.norm(), value / value.norm()
        cosine = a @ b
        sine = (1 - cosine**2).sqrt()
        across = (b - cosine * a) / sine
        plane = torch.stack((a, across))
        turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
        matrix = torch.eye(4, dtype=torch.float64) + plane.T @ (turn - torch.eye(2)) @ plane
        close(matrix @ a, b)
        close(found, value.norm() / z.norm() * matrix.T @ grad)


def test_opposite_and_zero_rows_have_finite_gradients() -> None:
    z_ND = torch.stack((rows(1)[0], -rows(1)[0], torch.zeros(4))).requires_grad_()
    rotated(z_ND, rows(1).expand(3, -1)).sum().backward()
    assert z_ND.grad.isfinite().all()


def test_unit_rows() -> None:
    z_ND = torch.cat((rows(3), torch.zeros(1, 4)))
    close(unit(z_ND).norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert unit(torch.full((1, 4), 1e-8)).norm() < 0.1


def test_a_rows_error_is_its_mean() -> None:
    a, b = rows(3), rows(3, seed=1)
    close(squared_error(a, b), sum(((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)))


def test_autocast_leaves_what_is_inside_alone() -> None:
    a = rows(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a.T).dtype == torch.bfloat16
        with fp32(a.device):
            assert (a @ a.T).dtype == torch.float32
    with fp32(torch.device("meta")):
        pass


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.log()).sum()


def assert_entropy_of_six(found: Tensor, logits_NK: Tensor) -> None:
    """Value and gradient are those of six times the entropy of the rows' mean."""
    found.backward()
    gradient, logits_NK.grad = logits_NK.grad, None
    expected = 6 * entropy(logits_NK.softmax(1).mean(0))
    expected.backward()
    close(found, expected)
    close(gradient, logits_NK.grad)


def test_the_entropy_of_the_mean_and_its_gradient() -> None:
    logits_NK = rows(6, 5).double().requires_grad_()
    weights = logits_NK.softmax(1)
    assert_entropy_of_six(entropy_of_mean(weights.sum(0), 6, over_ranks=False), logits_NK)


def test_shares_of_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks with 4 and 2 rows, in one process: each is told what both hold together."""
    logits_NK = rows(6, 5).double().requires_grad_()
    masses = [part.softmax(1).sum(0) for part in logits_NK.split([4, 2])]
    whole = torch.cat([torch.stack(masses).sum(0).detach(), torch.tensor([6.0], dtype=torch.float64)])
    monkeypatch.setattr(common, "all_reduce_sum", lambda own: whole)
    parts = [entropy_of_mean(m, n, over_ranks=True) for m, n in zip(masses, (4, 2), strict=True)]
    assert_entropy_of_six(torch.stack(parts).sum(), logits_NK)


def test_several_distributions_lie_side_by_side_and_an_impossible_code_is_no_nan() -> None:
    parts = [rows(6, 3, seed=seed).softmax(1) for seed in (0, 1)]
    parts[1] = torch.tensor([[1.0, 0.0, 0.0]]).expand(6, -1)
    found = entropy_of_mean(torch.stack([part.sum(0) for part in parts]), 6, over_ranks=False)
    close(found, 6 * entropy(parts[0].mean(0)))


@pytest.mark.parametrize(
    ("check", "good", "wrong"),
    [
        (lambda value: common.check_size("num_codes", value, 2), [2, 9], [1, 0]),
        (lambda value: common.check_weight("commitment", value), [0, 0.5], [-1, math.inf, math.nan]),
        (lambda value: common.check_positive("temperature", value), [0.5], [0, -1, math.inf, math.nan]),
        (lambda value: common.check_share("decay", value), [0, 0.99], [1, -0.1, math.nan]),
    ],
)
def test_arguments_out_of_range(
    check: Callable[[float], None], good: list[float], wrong: list[float]
) -> None:
    for value in good:
        check(value)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"model\.quantizer\.\w+={value} must be "):
            check(value)
