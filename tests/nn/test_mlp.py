"""Feed-forward blocks against plain expressions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cantata.nn.mlp import GELU, SwiGLU, gate, gate_gradients


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gate_equals_the_plain_expression(weighted: bool) -> None:
    torch.manual_seed(0)
    inner, weights, grad = torch.randn(5, 12), torch.rand(5, 1), torch.randn(5, 6)
    inner.requires_grad_()
    weights.requires_grad_()
    first, second = inner.chunk(2, dim=-1)
    expected = F.silu(first) * second * (weights if weighted else 1)
    expected.backward(grad)
    given = (weights.detach(),) if weighted else ()
    torch.testing.assert_close(gate(inner.detach(), *given), expected, rtol=1e-6, atol=1e-6)
    hidden, grad_inner, grad_weights = gate_gradients(inner.detach(), grad, *given)
    torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_inner, inner.grad, rtol=1e-6, atol=1e-6)
    if weighted:
        torch.testing.assert_close(grad_weights[:, None], weights.grad, rtol=1e-6, atol=1e-6)
    else:
        assert grad_weights is None


def test_blocks_equal_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    gated = SwiGLU(8, 12)
    gate, up, down = gated.gate_proj.weight, gated.up_proj.weight, gated.down_proj.weight
    torch.testing.assert_close(gated(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-5, atol=1e-6)
    given = x.clone().requires_grad_()
    gated(given).square().sum().backward()
    found = [given.grad, gate.grad, up.grad, down.grad]
    plainly = x.clone().requires_grad_()
    slow = (F.silu(plainly @ gate.T) * (plainly @ up.T)) @ down.T
    expected = torch.autograd.grad(slow.square().sum(), (plainly, gate, up, down))
    torch.testing.assert_close(found, list(expected), rtol=1e-6, atol=1e-6)
    plain = GELU(8, 12, 4, bias=True)
    inner = x @ plain.fc1.weight.T + plain.fc1.bias
    inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(plain(x), inner @ plain.fc2.weight.T + plain.fc2.bias, rtol=1e-5, atol=1e-6)
    exact = GELU(8, 12, 4, bias=True, approximate="none")
    inner = x @ exact.fc1.weight.T + exact.fc1.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(exact(x), inner @ exact.fc2.weight.T + exact.fc2.bias, rtol=1e-5, atol=1e-6)
