"""Feed-forward blocks: SwiGLU and plain GELU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cantata.nn.matmul import Linear


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` that keeps only its inputs and writes both gradients into one buffer."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a tensor whose last dimension holds [gate | up] (Shazeer, 2020)."""
    result: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return result


class SwiGLU(nn.Module):
    """Gated feed-forward block without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class GELU(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, in_features: int, intermediate_size: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = Linear(in_features, intermediate_size, bias=bias)
        self.fc2 = Linear(intermediate_size, out_features, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TD), approximate="tanh"))
