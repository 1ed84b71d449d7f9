"""Feed-forward blocks: SwiGLU and plain GELU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cantata.nn.matmul import Linear


def gate(inner_TF: Tensor, weights_T1: Tensor | None = None) -> Tensor:
    """`silu(g) * u` of a tensor whose last dimension holds [g | u] (Shazeer, 2020), times the weights."""
    gate_TF, up_TF = inner_TF.chunk(2, dim=-1)
    hidden_TF = F.silu(gate_TF).mul_(up_TF)
    return hidden_TF if weights_T1 is None else hidden_TF.mul_(weights_T1)


def gate_gradients(
    inner_TF: Tensor, grad_TF: Tensor, weights_T1: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `gate` gives, and the gradients of its two inputs."""
    gate_TF, up_TF = inner_TF.chunk(2, dim=-1)
    grad_inner_TF = torch.empty_like(inner_TF)
    grad_gate_TF, grad_up_TF = grad_inner_TF.chunk(2, dim=-1)
    silu_TF = F.silu(gate_TF)
    hidden_TF = silu_TF * up_TF
    grad_weights_T = None
    if weights_T1 is not None:
        grad_weights_T = (grad_TF * hidden_TF).sum(-1, dtype=torch.float32)
        hidden_TF.mul_(weights_T1)
        grad_TF = grad_TF * weights_T1.to(grad_TF.dtype)
    torch.mul(silu_TF, grad_TF, out=grad_up_TF)
    torch.ops.aten.silu_backward.grad_input(grad_TF * up_TF, gate_TF, grad_input=grad_gate_TF)
    return hidden_TF, grad_inner_TF, grad_weights_T


class _Gated(Function):
    """`silu(gate) * up`, which keeps its two inputs for backward and not, as autograd would, silu too."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        grad_gate_TF = grad_TF * up_TF
        torch.ops.aten.silu_backward.grad_input(grad_gate_TF, gate_TF, grad_input=grad_gate_TF)
        return grad_gate_TF, F.silu(gate_TF).mul_(grad_TF)


class SwiGLU(nn.Module):
    """Gated feed-forward block without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_TF: Tensor = _Gated.apply(self.gate_proj(x_TD), self.up_proj(x_TD))  # type: ignore[no-untyped-call]
        return self.down_proj(hidden_TF)


class GELU(nn.Module):
    """Two linear layers with GELU between them: the function itself, or its approximation by tanh."""

    def __init__(
        self,
        in_features: int,
        intermediate_size: int,
        out_features: int,
        *,
        bias: bool,
        approximate: str = "tanh",
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(in_features, intermediate_size, bias=bias)
        self.fc2 = Linear(intermediate_size, out_features, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TD), approximate=self.approximate))
