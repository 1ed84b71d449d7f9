"""Linear layers whose products are widened on slow processors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cantata.nn import matmul
from cantata.nn.matmul import Linear, linear, product_dtype


@pytest.fixture(params=[True, False])
def fast_half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(matmul, "_FAST_HALF_PRODUCTS", request.param)
    return bool(request.param)


def test_only_half_precision_is_widened(fast_half: bool) -> None:
    wide = torch.bfloat16 if fast_half else torch.float32
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16)) == wide
    assert product_dtype(torch.zeros(1)) == torch.float32
    assert product_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 7])
def test_bf16_equals_fp32_products_rounded_once(fast_half: bool, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    layer = Linear(16, 8, bias=bias).bfloat16()
    x = torch.randn(rows, 16).bfloat16().requires_grad_()
    grad = torch.randn(rows, 8).bfloat16()
    out = layer(x)
    out.backward(grad)
    wide = [None if p is None else p.detach().float().requires_grad_() for p in (x, layer.weight, layer.bias)]
    expected = F.linear(*wide)
    expected.backward(grad.float())
    pairs = [(out, expected), (x.grad, wide[0].grad), (layer.weight.grad, wide[1].grad)]
    if bias:
        pairs.append((layer.bias.grad, wide[2].grad))
    for found, reference in pairs:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), reference.detach(), rtol=2**-7, atol=1e-6)


def test_frozen_parts_get_no_gradient(fast_half: bool) -> None:
    x = torch.randn(3, 4).bfloat16()
    weight = torch.randn(2, 4).bfloat16().requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
