"""The last linear layer and the cross entropy in one, so that logits exist only for a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cantata.nn.matmul import product_dtype

_CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time, unless the weight is so large that a quarter of it is more."""
_STRIP_ELEMENTS = 2**18
"""Logits that are softmaxed in fp32 at a time on the CPU: what its cache holds."""


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    row_weight_N: Tensor | None = None,
    low_NR: Tensor | None = None,
    low_weight_VR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `x @ weight.T`: its weighted fp32 sum over the rows, and each row's value (detached).

    Rows weigh 1 where `row_weight_N` (fp32) is None. The values of rows are without their weights. A product
    of low rank, `low @ low_weight.T`, is added to the logits if it is given.

    Gradients are made in the forward pass, chunk by chunk, while the logits are at hand; backward only
    scales them. The softmax is fp32 and the gradients of the weights are summed over chunks in fp32. A second
    backward through the same result raises.
    """
    low = () if low_NR is None else (low_NR, low_weight_VR)
    loss_sum, loss_N = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        labels_N, row_weight_N, torch.is_grad_enabled(), x_ND, weight_VD, *low
    )
    return loss_sum, loss_N


class _LinearCrossEntropy(torch.autograd.Function):
    """The logits are a sum of products, each of rows and a weight."""

    @staticmethod
    def forward(
        ctx: Any, labels_N: Tensor, row_weight_N: Tensor | None, with_grad: bool, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed = [with_grad and needs for needs in ctx.needs_input_grad[3:]]
        loss_N = torch.empty(len(labels_N), dtype=torch.float32, device=labels_N.device)
        V, D = factors[1].shape
        rows = max(1, max(_CHUNK_ELEMENTS, V * D // 4) // V)
        terms = [
            _Term.of(factors[i], factors[i + 1], needed[i], needed[i + 1], len(loss_N) <= rows)
            for i in range(0, len(factors), 2)
        ]
        for start in range(0, len(loss_N), rows):
            part = slice(start, start + rows)
            weights = None if row_weight_N is None else row_weight_N[part, None]
            loss_N[part] = _one_chunk([term.part(part) for term in terms], labels_N[part], weights)
        ctx.grads = [grad for term in terms for grad in (term.grad_x, term.grad_weight)]
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.mark_non_differentiable(loss_N)
        return (loss_N if row_weight_N is None else loss_N * row_weight_N).sum(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: backward ran twice through one result")
        found, ctx.grads = ctx.grads, None
        grads = (
            None if made is None else made.mul_(grad).to(dtype)
            for made, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return None, None, None, *grads


class _Term(NamedTuple):
    """A product that the logits are a sum of, and the gradients of its two factors, where they are needed."""

    x_ND: Tensor
    weight_VD: Tensor
    grad_x: Tensor | None
    grad_weight: Tensor | None

    @staticmethod
    def of(x_ND: Tensor, weight_VD: Tensor, needs_x: bool, needs_weight: bool, one_chunk: bool) -> _Term:
        # One product needs no sum in fp32.
        sum_dtype = weight_VD.dtype if one_chunk else torch.float32
        return _Term(
            x_ND,
            weight_VD.to(product_dtype(x_ND)),
            torch.empty_like(x_ND) if needs_x else None,
            torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_weight else None,
        )

    def part(self, rows: slice) -> _Term:
        """Of a few rows; the gradient of the weight is that of all."""
        x = self.x_ND[rows].to(self.weight_VD.dtype)
        return _Term(x, self.weight_VD, None if self.grad_x is None else self.grad_x[rows], self.grad_weight)


def _one_chunk(terms: Sequence[_Term], labels_N: Tensor, row_weight_N1: Tensor | None) -> Tensor:
    """Losses of a few rows; writes their gradient, and adds to the weights'."""
    first, *more = terms
    logits = first.x_ND @ first.weight_VD.t()
    for term in more:
        logits.addmm_(term.x_ND, term.weight_VD.t())
    loss_N = _softmax_minus_one_hot_(logits, labels_N)
    for x_ND, weight_VD, grad_x, grad_weight in terms:
        if grad_x is not None:
            grad_x.copy_(_weighted(logits @ weight_VD, row_weight_N1))
        # Weighing D columns on either side is cheaper than V logits.
        x = _weighted(x_ND, row_weight_N1)
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
