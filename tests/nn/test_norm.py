"""RMSNorm against the formula, written out."""

from __future__ import annotations

import math

import pytest
import torch

from cantata.nn.norm import RMSNorm


def test_equals_the_formula() -> None:
    norm = RMSNorm(5, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0]))
    x = torch.randn(4, 5)
    for row, out in zip(x.tolist(), norm(x), strict=True):
        scale = math.sqrt(sum(value**2 for value in row) / 5 + 1e-3)
        expected = [w * value / scale for w, value in zip(norm.weight.tolist(), row, strict=True)]
        torch.testing.assert_close(out, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(32, 1e-6)
    x64 = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    weight64 = (1 + torch.randn(32, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(7, 32)
    (weight64 * x64 * (x64.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).backward(grad.double())
    with torch.no_grad():
        norm.weight.copy_(weight64)
    norm.to(dtype)
    x = x64.detach().to(dtype).requires_grad_()
    norm(x).backward(grad.to(dtype))
    bound = 1e-5 if dtype == torch.float32 else 0.05
    for found, expected in ((x.grad, x64.grad), (norm.weight.grad, weight64.grad)):
        assert found is not None
        assert expected is not None
        assert float((found.double() - expected).abs().max() / expected.abs().max()) < bound
