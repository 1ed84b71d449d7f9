"""Signs as bits: against a softmax over all codes, and without one for 2^18 of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from tests.nn.quantize.small import LargestTensor, close, gradients, rows, small

BITS = 6


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def softmax_over_codes(z_ND: Tensor, temperature: float) -> Tensor:
    """`softmax(-|z - c|^2 / temperature)`, code k having bit d of k as its sign d."""
    bits = z_ND.shape[1]
    codes_KD = torch.tensor(
        [[1.0 if k >> d & 1 else -1.0 for d in range(bits)] for k in range(2**bits)], dtype=z_ND.dtype
    )
    return (-(z_ND[:, None] - codes_KD).square().sum(-1) / temperature).softmax(-1)


@pytest.mark.parametrize("group_bits", [6, 3, 2, 1])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_equals_its_formula(group_bits: int, temperature: float) -> None:
    quantizer = small("lfq", num_codes=2**BITS, group_bits=group_bits, entropy_temperature=temperature)
    z_ND, weight_ND = rows(12, seed=1, dim=BITS), rows(12, seed=2, dim=BITS).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)

    z = z_ND.detach().double().requires_grad_()
    signs = torch.where(z > 0, 1.0, -1.0).double()
    p_NK = softmax_over_codes(z, temperature)
    groups = [softmax_over_codes(part, temperature) for part in z.split(group_bits, 1)]
    terms = {
        "commitment": (z - signs).square().mean(1).sum(),
        "row_entropy": entropy(p_NK).sum(),
        "batch_entropy": 12 * sum(entropy(p.mean(0)) for p in groups),
    }
    loss = 0.25 * terms["commitment"] + 0.3 * terms["row_entropy"] - 0.2 * terms["batch_entropy"]
    (((z + (signs - z).detach()) * weight_ND).sum() + loss).backward()

    assert made.values_ND.tolist() == signs.tolist()
    assert made.indices_N.tolist() == p_NK.argmax(1).tolist()
    for name, term in terms.items():
        close(made.parts[name], term)
    close(made.loss_sum, loss)
    # Bound: at the low temperature the gradient is some 40 times that of the entropies.
    close(found["z"], z.grad, 1e-6 if temperature > 1 else 1e-5)


def test_groups_bound_the_entropy_of_the_mean_from_above() -> None:
    z_ND = rows(12, seed=1, dim=BITS)
    exact, *grouped = [
        small("lfq", num_codes=2**BITS, group_bits=g)(z_ND).parts["batch_entropy"] for g in (6, 3, 1)
    ]
    assert exact < grouped[0] < grouped[1]


@pytest.mark.parametrize("group_bits", [18, 9])
def test_two_to_the_18_codes_need_no_row_of_codes(group_bits: int) -> None:
    quantizer = small("lfq", num_codes=2**18, group_bits=group_bits)
    z_ND = rows(64, dim=18)
    with LargestTensor() as largest:
        made, _ = gradients(quantizer, z_ND, torch.ones(64, 18))
    assert made.usage_K.sum() == 64
    assert largest.elements <= 2**18 + 1, "N x K would be 64 times as much"


def test_saturated_bits_are_finite() -> None:
    z_ND = torch.tensor([[50.0, -50.0, 0.0]], requires_grad=True)
    made, found = gradients(small("lfq", entropy_temperature=0.01), z_ND, torch.zeros(1, 3))
    assert made.parts["row_entropy"].item() == pytest.approx(0.6931472, rel=1e-6)
    assert found["z"].isfinite().all()
    assert made.values_ND.tolist() == [[1.0, -1.0, -1.0]]


def test_every_code_is_one_sign_pattern() -> None:
    quantizer = small("lfq")
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    made = quantizer(patterns)
    assert sorted(made.indices_N.tolist()) == list(range(8))
    assert quantizer.decode(torch.tensor([1])).tolist() == [[1.0, -1.0, -1.0]], "bit 0 is the first value"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 12}, r"num_codes=12 must be a power of 2"),
        ({"group_bits": 2}, r"group_bits=2 must be a divisor of the 3 bits"),
        ({"group_bits": 0}, r"group_bits=0 must be"),
        ({"entropy_temperature": 0.0}, r"entropy_temperature=0\.0 must be a number above 0"),
        ({"row_entropy": -1.0}, r"row_entropy=-1\.0 must be"),
        ({"batch_entropy": float("inf")}, r"batch_entropy=inf must be"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.quantizer\.{message}"):
        small("lfq", **changes)
