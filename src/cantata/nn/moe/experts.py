"""The experts of an MoE layer: E SwiGLU blocks whose matrices lie in two tensors.

N  tokens    K  rows of each token    R  rows, sorted by expert
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cantata.nn.mlp import gate, gate_gradients
from cantata.nn.moe.dispatch import Dispatched, by_row, sum_rows
from cantata.nn.moe.looped import looped_experts, looped_experts_backward


class Experts(nn.Module):
    """`num_experts` SwiGLU blocks without biases.

    `fc1` (E, D, 2F) holds [gate | up] and `fc2` (E, F, D), both in (in, out) order, which is what the
    grouped products take. `local` gives the part of a weight that this process computes with; a plan that
    spreads the experts replaces it.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * intermediate_size))
        self.fc2 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.local: Callable[[Tensor], Tensor] = _whole

    def forward(self, given: Dispatched) -> Tensor:
        """Every row through its expert; the (weighted) sum of each token's results: (N, D)."""
        weights = self.local(self.fc1), self.local(self.fc2)
        y_ND: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
            given.x_ND, given.weights_NK, *weights, given.tokens_per_expert_E, *given.order
        )
        return y_ND


def _whole(weight: Tensor) -> Tensor:
    return weight


class _Experts(torch.autograd.Function):
    """Keeps the tokens and fc1's outputs; rows and what the gate gives are made again in backward.

    The weights scale the inputs of fc2, not its outputs. That gives the same sum, and their gradients without
    the outputs: `d/dw <g, w h fc2> = <g fc2^T, h>`.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weights_NK: Tensor | None, *rest: Tensor) -> Tensor:
        run = grouped_experts if can_group(x_ND, *rest[:2]) else looped_experts
        y_ND, inner_RF = run(x_ND, weights_NK, *rest)
        ctx.save_for_backward(inner_RF, x_ND, weights_NK, *rest)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        inner_RF, x_ND, weights_NK, *rest = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:4])
        run = grouped_experts_backward if can_group(x_ND, *rest[:2]) else looped_experts_backward
        grads = run(grad_ND, inner_RF, needed, x_ND, weights_NK, *rest)
        return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), *[None] * 4


def can_group(x_RD: Tensor, *weights: Tensor) -> bool:
    """Whether to use the grouped kernel: on a device, some rows, not fp64, strides of 16-byte multiples."""
    supported = x_RD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(w.shape[-1] * w.element_size() % 16 == 0 for w in (x_RD, *weights))
    return x_RD.device.type != "cpu" and supported and aligned and x_RD.shape[0] > 0


def grouped_experts(
    x_ND: Tensor,
    weights_NK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    tokens_per_expert_E: Tensor,
    token_R: Tensor,
    row_NK: Tensor,
    choice_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """`looped_experts` with one call for each product, without waiting for the device."""
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    inner_RF = F.grouped_mm(x_ND.index_select(0, token_R), fc1, offs=ends_E)
    hidden_RF = gate(inner_RF, by_row(weights_NK, choice_R))
    return sum_rows(F.grouped_mm(hidden_RF, fc2, offs=ends_E), row_NK), inner_RF


def grouped_experts_backward(
    grad_ND: Tensor,
    inner_RF: Tensor,
    needed: Sequence[bool],
    x_ND: Tensor,
    weights_NK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    tokens_per_expert_E: Tensor,
    token_R: Tensor,
    row_NK: Tensor,
    choice_R: Tensor,
) -> list[Tensor | None]:
    """The gradients of x, the weights, fc1 and fc2, where they are needed."""
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    needs_x, _, needs_fc1, needs_fc2 = needed
    grad_RD = grad_ND.index_select(0, token_R)
    grad_hidden_RF = F.grouped_mm(grad_RD, fc2.transpose(1, 2), offs=ends_E)
    hidden_RF, grad_inner_RF, dots_R = gate_gradients(inner_RF, grad_hidden_RF, by_row(weights_NK, choice_R))
    grads: list[Tensor | None] = [None] * 4
    if needs_fc2:
        grads[3] = F.grouped_mm(hidden_RF.t(), grad_RD, offs=ends_E)
    del grad_RD, grad_hidden_RF, hidden_RF
    if needs_fc1:
        grads[2] = F.grouped_mm(x_ND.index_select(0, token_R).t(), grad_inner_RF, offs=ends_E)
    if needs_x:
        grads[0] = sum_rows(F.grouped_mm(grad_inner_RF, fc1.transpose(1, 2), offs=ends_E), row_NK)
    if weights_NK is not None and dots_R is not None:
        grads[1] = dots_R[row_NK].to(weights_NK.dtype)
    return grads
