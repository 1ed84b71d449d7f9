"""SimVQ against its formula, and what makes it special: one row moves every code."""

from __future__ import annotations

import pytest
import torch

from cantata.core.errors import ConfigError
from tests.nn.quantize.small import DIM, close, gradients, rows, small
from tests.nn.quantize.test_vq import slow


def test_equals_its_formula() -> None:
    quantizer = small("simvq")
    with torch.no_grad():
        quantizer.weight_DD.copy_(rows(DIM, seed=5))
    z_ND, weight_ND = rows(20, seed=1), rows(20, seed=2).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)

    slow_z, matrix = (tensor.detach().double().requires_grad_() for tensor in (z_ND, quantizer.weight_DD))
    codes_KD = torch.stack([e @ matrix for e in quantizer.codebook_KD.double()])
    values_ND, indices, codebook, committed = slow(slow_z, codes_KD, 0.25, unit=False)
    loss = codebook + 0.25 * committed
    ((values_ND * weight_ND).sum() + loss).backward()
    assert made.indices_N.tolist() == indices
    close(made.values_ND, values_ND)
    close(made.loss_sum, loss)
    close(found["z"], slow_z.grad)
    close(found["weight_DD"], matrix.grad)
    assert set(found) == {"z", "weight_DD"}, "the codebook is fixed"


def test_one_row_moves_every_code() -> None:
    quantizer = small("simvq")
    before = quantizer.decode(torch.arange(quantizer.num_codes)).detach()
    gradients(quantizer, rows(1, seed=3), torch.zeros(1, DIM))
    with torch.no_grad():
        quantizer.weight_DD -= 0.1 * quantizer.weight_DD.grad
    after = quantizer.decode(torch.arange(quantizer.num_codes)).detach()
    assert (before != after).any(1).all()


def test_starts_from_the_random_codes() -> None:
    quantizer = small("simvq")
    close(quantizer.decode(torch.arange(quantizer.num_codes)), quantizer.codebook_KD)
    with pytest.raises(ConfigError, match=r"model\.quantizer\.commitment=-1"):
        small("simvq", commitment=-1)
