"""The last linear layer and the cross entropy in one, so that logits exist only for a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cantata.nn.matmul import product_dtype

_CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time, unless the weight is so large that a quarter of it is more."""
_STRIP_ELEMENTS = 2**18
"""Logits that are softmaxed in fp32 at a time on the CPU: what its cache holds."""


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, row_weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `x @ weight.T`: its weighted fp32 sum over the rows, and each row's value (detached).

    Rows weigh 1 where `row_weight_N` (fp32) is None. The values of rows are without their weights.

    Gradients are made in the forward pass, chunk by chunk, while the logits are at hand; backward only
    scales them. The softmax is fp32 and the weight's gradient is summed over chunks in fp32. A second
    backward through the same result raises.
    """
    loss_sum, loss_N = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_VD, labels_N, row_weight_N, torch.is_grad_enabled()
    )
    return loss_sum, loss_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        row_weight_N: Tensor | None,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_x, needs_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        rows = max(1, max(_CHUNK_ELEMENTS, weight_VD.numel() // 4) // weight_VD.shape[0])
        loss_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        grad_x = torch.empty_like(x_ND) if needs_x else None
        # One product needs no sum in fp32.
        sum_dtype = weight_VD.dtype if len(x_ND) <= rows else torch.float32
        grad_weight = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_weight else None
        weight = weight_VD.to(product_dtype(x_ND))
        for start in range(0, len(x_ND), rows):
            part = slice(start, start + rows)
            grad_part = None if grad_x is None else grad_x[part]
            weights = None if row_weight_N is None else row_weight_N[part, None]
            loss_N[part] = _one_chunk(x_ND[part], weight, labels_N[part], weights, grad_part, grad_weight)
        ctx.grads = (grad_x, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_N)
        return (loss_N if row_weight_N is None else loss_N * row_weight_N).sum(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: backward ran twice through one result")
        grad_x, grad_weight = ctx.grads
        ctx.grads = None
        if grad_x is not None:
            grad_x = grad_x.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None


def _one_chunk(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    row_weight_N1: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Losses of a few rows; writes their gradient, and adds to the weight's."""
    x = x_ND.to(weight_VD.dtype)
    logits = x @ weight_VD.t()
    loss_N = _softmax_minus_one_hot_(logits, labels_N)
    if grad_x is not None:
        grad_x.copy_(_weighted(logits @ weight_VD, row_weight_N1))
    # Weighing D columns on either side is cheaper than V logits.
    x = _weighted(x, row_weight_N1)
    if grad_weight is not None and grad_weight.dtype == logits.dtype:
        grad_weight.addmm_(logits.t(), x)
    elif grad_weight is not None:
        grad_weight.add_(logits.t() @ x)
    return loss_N


def _weighted(rows_ND: Tensor, row_weight_N1: Tensor | None) -> Tensor:
    return rows_ND if row_weight_N1 is None else rows_ND * row_weight_N1.to(rows_ND.dtype)


def _softmax_minus_one_hot_(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Turn logits into their cross entropy's gradient in place; returns each row's loss in fp32."""
    rows = max(1, _STRIP_ELEMENTS // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else len(logits_NV)
    losses = []
    for start in range(0, len(logits_NV), rows):
        strip, labels = logits_NV[start : start + rows], labels_N[start : start + rows, None]
        target = strip.gather(1, labels).squeeze(1).float()
        highest = strip.amax(1).float()
        probabilities = strip.softmax(1, dtype=torch.float32)
        # The largest probability is at least 1 / V, so its logarithm is safe where the target's may not be.
        losses.append(highest - probabilities.amax(1).log() - target)
        strip.copy_(probabilities.scatter_add_(1, labels, probabilities.new_full(labels.shape, -1.0)))
    return torch.cat(losses)
