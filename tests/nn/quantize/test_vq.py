"""The plain quantiser against its formula, one row after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.nn.quantize import VectorQuantizer
from tests.nn.quantize.small import CODES, KINDS, close, gradients, rows, small


def slow(
    z_ND: Tensor, codes_KD: Tensor, commitment: float, unit: bool
) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Values, indices and the two losses."""
    values, indices = [], []
    codebook = committed = torch.zeros((), dtype=torch.float64)
    for z in z_ND:
        z = z / z.norm() if unit else z
        codes = [e / e.norm() if unit else e for e in codes_KD]
        distances = [(z - e).square().sum().item() for e in codes]
        index = distances.index(min(distances))
        indices.append(index)
        codebook = codebook + (codes[index] - z.detach()).square().mean()
        committed = committed + (codes[index].detach() - z).square().mean()
        values.append(z + (codes[index] - z).detach())
    return torch.stack(values), indices, codebook, committed


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("commitment", [0.0, 0.25, 2.0])
def test_equals_its_formula(unit: bool, commitment: float) -> None:
    quantizer = small("vq", l2_normalize=unit, commitment=commitment)
    z_ND, weight_ND = rows(20, seed=1), rows(20, seed=2).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)

    slow_z, slow_codes = (
        tensor.detach().double().requires_grad_() for tensor in (z_ND, quantizer.codebook_KD)
    )
    values_ND, indices, codebook, committed = slow(slow_z, slow_codes, commitment, unit)
    loss = codebook + commitment * committed
    ((values_ND * weight_ND).sum() + loss).backward()

    assert made.indices_N.tolist() == indices
    close(made.values_ND, values_ND)
    close(made.loss_sum, loss)
    close(made.parts["codebook"], codebook)
    close(made.parts["commitment"], committed)
    close(found["z"], slow_z.grad)
    close(found["codebook_KD"], slow_codes.grad)


def test_rotation_turns_the_gradient_by_the_matrix_that_turns_the_row() -> None:
    quantizer = small("rotation", commitment=0.0)
    z_ND, weight_ND = rows(20, seed=1), rows(20, seed=2).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)
    for z, e, weight, gradient in zip(
        z_ND.detach(), made.values_ND.detach(), weight_ND, found["z"], strict=True
    ):
        start, end = z / z.norm(), e / e.norm()
        between = (start + end) / (start + end).norm()
        turn = torch.eye(len(z)) - 2 * torch.outer(between, between) + 2 * torch.outer(end, start)
        close(turn @ turn.t(), torch.eye(len(z)), 1e-5)
        close(e.norm() / z.norm() * turn @ z, e, 1e-5)
        # Bound: two roundings of a product of norms and a rotation, each some 1e-7 of numbers up to 10.
        close(gradient, e.norm() / z.norm() * turn.t() @ weight, 1e-5)
    close(found["codebook_KD"], gradients(small("vq", commitment=0.0), z_ND, weight_ND)[1]["codebook_KD"])


def test_rows_of_zeros_and_opposite_rows_have_finite_gradients() -> None:
    for kind in ("l2_vq", "rotation"):
        quantizer = small(kind)
        zeros_ND = torch.zeros(2, 3, requires_grad=True)
        _, found = gradients(quantizer, zeros_ND, torch.ones(2, 3))
        assert found["z"].isfinite().all()
    quantizer = small("rotation", num_codes=2)
    with torch.no_grad():
        quantizer.codebook_KD.copy_(torch.tensor([[-1.0, 0, 0], [-9.0, 0, 0]]))
    opposite_ND = torch.tensor([[2.0, 0, 0]], requires_grad=True)
    made, found = gradients(quantizer, opposite_ND, torch.ones(1, 3))
    assert made.values_ND.tolist() == [[-1.0, 0, 0]]
    assert found["z"].isfinite().all()


def test_codes_begin_small_or_of_length_one() -> None:
    for kind in ("vq", "l2_vq"):
        quantizer = VectorQuantizer(**KINDS[kind][1])
        quantizer.init_parameter("codebook_KD", quantizer.codebook_KD.data, torch.Generator().manual_seed(0))
        codes_KD = quantizer.codebook_KD.detach()
        if kind == "vq":
            assert codes_KD.abs().max() <= 1 / CODES
            assert codes_KD.std() > 0.3 / CODES
        else:
            close(codes_KD.norm(dim=1), torch.ones(CODES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 1}, r"model\.quantizer\.num_codes=1 must be at least 2"),
        ({"dim": 0}, r"model\.quantizer\.dim=0 must be at least 1"),
        ({"commitment": -0.1}, r"model\.quantizer\.commitment=-0\.1 must be a number, at least 0"),
        ({"commitment": float("nan")}, r"commitment=nan"),
        ({"gradient": "rotations"}, r"gradient=rotations must be one of .*; nearest: rotation"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small("vq", **changes)
