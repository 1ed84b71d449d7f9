"""Rows in expert order and their sums against loops over tokens and choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.nn.moe.dispatch import LocalDispatcher, Order, expand, reduce


def slow(x: Tensor, index: Tensor, weights: Tensor, scale_E: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Expert e multiplies by scale_E[e]; returns the outcome and the rows in expert order."""
    rows = [x[t] for e in range(len(scale_E)) for t in range(len(x)) if e in index[t].tolist()]
    out = [
        sum(
            (weights[t, k] * scale_E[e] * x[t] for k, e in enumerate(index[t].tolist())),
            torch.zeros_like(x[t]),
        )
        for t in range(len(x))
    ]
    return torch.stack(out) if out else x * 1, rows


@pytest.mark.parametrize(("tokens", "top_k"), [(9, 2), (5, 1), (4, 6), (0, 2)])
def test_equals_loops(tokens: int, top_k: int) -> None:
    torch.manual_seed(0)
    index = (
        torch.stack([torch.randperm(6)[:top_k] for _ in range(tokens)])
        if tokens
        else torch.zeros(0, top_k).long()
    )
    x0, weights0, scale_E = torch.randn(tokens, 4), torch.rand(tokens, top_k), torch.randn(6)
    grad = torch.randn(tokens, 4)

    x, weights = x0.clone().requires_grad_(), weights0.clone().requires_grad_()
    dispatched = LocalDispatcher(6).receive(LocalDispatcher(6).send(x, weights, index))
    tokens_per_expert_E, order = dispatched.tokens_per_expert_E, dispatched.order
    rows = expand(dispatched.x_ND, order)
    y = rows * scale_E.repeat_interleave(tokens_per_expert_E)[:, None]
    out = reduce(y, weights, order)
    out.backward(grad)

    slow_x, slow_weights = x0.clone().requires_grad_(), weights0.clone().requires_grad_()
    expected, expected_rows = slow(slow_x, index, slow_weights, scale_E)
    expected.backward(grad)

    assert tokens_per_expert_E.tolist() == [int((index == e).sum()) for e in range(6)]
    if tokens:
        assert torch.equal(rows, torch.stack(expected_rows))
        torch.testing.assert_close(weights.grad, slow_weights.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, slow_x.grad, rtol=1e-6, atol=1e-6)


def test_bf16_rounds_once() -> None:
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(6)[:4] for _ in range(50)])
    x, weights = torch.randn(50, 8).bfloat16(), torch.rand(50, 4).softmax(-1)
    order = Order.of(index)
    out = reduce(expand(x, order), weights, order)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x.float(), rtol=2**-6, atol=1e-6)
