"""The experts of an MoE layer: E SwiGLU blocks whose matrices lie in two tensors.

N  tokens    K  rows of each token    R  rows, sorted by expert
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cantata.nn.matmul import product_dtype
from cantata.nn.moe.dispatch import Dispatched
from cantata.nn.moe.grouped import grouped_experts, grouped_experts_backward
from cantata.nn.moe.looped import looped_experts, looped_experts_backward
from cantata.nn.moe.low_rank import Flat, factors

_CACHED_ELEMENTS = 2**17
"""Outputs of fc1 that a processor's caches hold: half a MiB in fp32."""


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
        return run_experts(given, self.local(self.fc1), self.local(self.fc2))


def run_experts(given: Dispatched, fc1: Tensor, fc2: Tensor, low: Flat = ()) -> Tensor:
    """What `Experts` computes; `low` is added to the two weights (see `low_rank`)."""
    if not torch.is_grad_enabled() and _are_few(given.x_ND, given.order.token_R, fc1, fc2, low):
        routing = given.tokens_per_expert_E, *given.order
        return grouped_experts(given.x_ND, given.weights_NK, fc1, fc2, *routing, low)[0]
    y_ND: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        given.x_ND, given.weights_NK, fc1, fc2, given.tokens_per_expert_E, *given.order, *low
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
    def forward(ctx: Any, x_ND: Tensor, weights_NK: Tensor | None, *rest: Any) -> Tensor:
        fc1, fc2, *routing = rest[:6]
        low = rest[6:]
        run: Callable[..., Any] = grouped_experts if _can_group(x_ND, fc1, fc2, low) else looped_experts
        y_ND: Tensor
        y_ND, inner_RF = run(x_ND, weights_NK, fc1, fc2, *routing, low)
        ctx.save_for_backward(inner_RF, x_ND, weights_NK, *rest)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        inner_RF, x_ND, weights_NK, fc1, fc2, *rest = ctx.saved_tensors
        routing, low = rest[:4], rest[4:]
        wanted = ctx.needs_input_grad
        needed = [*wanted[:4], any(wanted[8:11]), any(wanted[11:])]
        grouped = _can_group(x_ND, fc1, fc2, low)
        run: Callable[..., Any] = grouped_experts_backward if grouped else looped_experts_backward
        grads = run(grad_ND, inner_RF, needed, x_ND, weights_NK, fc1, fc2, *routing, low)
        places = [*grads[:4], *[None] * 4, *grads[4:6], None, *grads[6:], None]
        return tuple(grad if want else None for grad, want in zip(places, wanted, strict=False))


def _are_few(x_ND: Tensor, token_R: Tensor, fc1: Tensor, fc2: Tensor, low: Flat) -> bool:
    """Whether the grouped kernel is the faster one on a processor too, whose caches hold all rows.

    So it is in generation: a loop would start a dozen operators for an expert's one or two rows.
    """
    cached = 0 < len(token_R) * fc1.shape[-1] <= _CACHED_ELEMENTS
    return cached and product_dtype(x_ND) == x_ND.dtype and _has_kernel(x_ND, fc1, fc2, *_given(low))


def _can_group(x_ND: Tensor, fc1: Tensor, fc2: Tensor, low: Flat) -> bool:
    return can_group(x_ND, fc1, fc2, *_given(low))


def _given(low: Flat) -> list[Tensor]:
    return [factor for factor in factors(low) if factor is not None]


def can_group(x_RD: Tensor, *weights: Tensor) -> bool:
    """Whether to use the grouped kernel: on a device, some rows, not fp64, strides of 16-byte multiples."""
    return x_RD.device.type != "cpu" and x_RD.shape[0] > 0 and _has_kernel(x_RD, *weights)


def _has_kernel(x_RD: Tensor, *weights: Tensor) -> bool:
    supported = x_RD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return supported and all(w.shape[-1] * w.element_size() % 16 == 0 for w in (x_RD, *weights))
