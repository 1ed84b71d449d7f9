"""The looped operators where they differ from the grouped ones: widening, any size, no values."""

from __future__ import annotations

import pytest
import torch
from torch import library

from cantata.nn import matmul
from cantata.nn.moe.dispatch import Order
from cantata.nn.moe.looped import looped_experts, looped_experts_backward
from cantata.nn.moe.router import count
from tests.nn.moe.test_experts import EXPERTS, gradients, ours, plain, problem


@pytest.mark.parametrize("fast_half", [True, False])
def test_bf16_equals_fp32_within_its_roundings(monkeypatch: pytest.MonkeyPatch, fast_half: bool) -> None:
    """Bounds, of the norms: widened, only fc1's outputs and the sums are rounded; else all between."""
    monkeypatch.setattr(matmul, "_FAST_HALF_PRODUCTS", fast_half)
    leaves, index, grad = problem("uneven", 64, 48)
    # The router's weights are fp32 in every precision.
    leaves, grad = [leaf if i == 1 else leaf.bfloat16() for i, leaf in enumerate(leaves)], grad.bfloat16()
    found = gradients(ours, leaves, index, grad)
    expected = gradients(plain, [leaf.float() for leaf in leaves], index, grad.float())
    for a, b, like in zip(found, expected, [grad, *leaves], strict=True):
        assert a.dtype == like.dtype
        assert (a.float() - b).norm() <= (2**-7 if fast_half else 0.9 * 2**-8) * b.norm()


@pytest.mark.parametrize(("hidden", "width"), [(6, 5), (1, 1)])
def test_any_size_and_fp64(hidden: int, width: int) -> None:
    leaves, index, grad = problem("uneven", hidden, width)
    leaves, grad = [leaf.double() for leaf in leaves], grad.double()
    found, expected = gradients(ours, leaves, index, grad), gradients(plain, leaves, index, grad)
    for a, b in zip(found, expected, strict=True):
        # The gradient of the weights is summed in fp32.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_operators_keep_torchs_rules() -> None:
    """Nothing aliases, and the shapes that tensors without values get are the real ones."""
    (x, weights, *experts), index, grad = problem("idle first and last")
    routing = (count(index, EXPERTS), *Order.of(index))
    checks = ("test_schema", "test_faketensor")
    for maybe in (weights, None):
        library.opcheck(looped_experts, (x, maybe, *experts, *routing, []), test_utils=checks)
        _, inner = looped_experts(x, maybe, *experts, *routing, [])
        given = (
            grad,
            inner,
            [True, maybe is not None, False, True, False, False],
            x,
            maybe,
            *experts,
            *routing,
            [],
        )
        library.opcheck(looped_experts_backward, given, test_utils=checks)
