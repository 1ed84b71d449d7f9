"""Feed-forward blocks against plain expressions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cantata.nn.mlp import GELU, SwiGLU, swiglu


def test_swiglu_equals_the_plain_expression() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(5, 12), torch.randn(5, 6)
    fast, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = swiglu(fast)
    out.backward(grad)
    gate, up = slow.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-6, atol=1e-6)


def test_blocks_equal_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    gated = SwiGLU(8, 12)
    gate, up, down = gated.gate_proj.weight, gated.up_proj.weight, gated.down_proj.weight
    torch.testing.assert_close(gated(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-5, atol=1e-6)
    plain = GELU(8, 12, 4, bias=True)
    inner = x @ plain.fc1.weight.T + plain.fc1.bias
    inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(plain(x), inner @ plain.fc2.weight.T + plain.fc2.bias, rtol=1e-5, atol=1e-6)
