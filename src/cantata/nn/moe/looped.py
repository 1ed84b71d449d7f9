"""The experts one after another: for processors, whose caches hold one expert's share.

N  tokens    K  rows of each token    R  rows, sorted by expert    r  rows of one expert

Finishing each product for all rows before the next one starts would send every value in between through main
memory, and widening the weights of all experts at once every weight. The two operators are opaque to the
compiler, to recomputation and to tensors without values, none of which could follow a loop over counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

from cantata.nn.matmul import product_dtype
from cantata.nn.mlp import gate, gate_gradients
from cantata.nn.moe.dispatch import by_row


@library.custom_op(
    "cantata::experts",
    mutates_args=(),
    schema="(Tensor x_ND, Tensor? weights_NK, Tensor fc1, Tensor fc2, Tensor tokens_per_expert_E,"
    " Tensor token_R, Tensor row_NK, Tensor choice_R) -> (Tensor, Tensor)",
)
def looped_experts(
    x_ND: Tensor,
    weights_NK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    tokens_per_expert_E: Tensor,
    token_R: Tensor,
    row_NK: Tensor,
    choice_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """The (weighted) sum of each token's results, and fc1's outputs, multiplied in `product_dtype(x)`."""
    wide = product_dtype(x_ND)
    y_ND = x_ND.new_zeros(x_ND.shape, dtype=wide)
    inner_RF = _inner(x_ND, fc1, token_R)
    rows = _by_expert(tokens_per_expert_E.tolist(), token_R, inner_RF, by_row(weights_NK, choice_R))
    for expert, (token_r, inner_rF, weights_r1) in enumerate(rows):
        wide_rF = _product(x_ND.index_select(0, token_r).to(wide), fc1[expert].to(wide), inner_rF)
        _add_product(y_ND, token_r, gate(wide_rF, weights_r1), fc2[expert].to(wide))
    return y_ND.to(x_ND.dtype), inner_RF


@library.custom_op(
    "cantata::experts_backward",
    mutates_args=(),
    schema="(Tensor grad_ND, Tensor inner_RF, bool[] needed, Tensor x_ND, Tensor? weights_NK, Tensor fc1,"
    " Tensor fc2, Tensor tokens_per_expert_E, Tensor token_R, Tensor row_NK, Tensor choice_R) -> Tensor[]",
)
def looped_experts_backward(
    grad_ND: Tensor,
    inner_RF: Tensor,
    needed: list[bool],
    x_ND: Tensor,
    weights_NK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    tokens_per_expert_E: Tensor,
    token_R: Tensor,
    row_NK: Tensor,
    choice_R: Tensor,
) -> list[Tensor]:
    """The gradients of x, the weights, fc1 and fc2; an empty tensor for one that is not needed."""
    wide = product_dtype(x_ND)
    needs_x, _, needs_fc1, needs_fc2 = needed
    grads = _gradients(needed, x_ND, weights_NK, fc1, fc2)
    grad_x_ND = x_ND.new_zeros(x_ND.shape if needs_x else 0, dtype=wide)
    dots_R = inner_RF.new_empty(len(inner_RF), dtype=torch.float32)
    lengths, weights_R1 = tokens_per_expert_E.tolist(), by_row(weights_NK, choice_R)
    rows = _by_expert(lengths, token_R, inner_RF, weights_R1, dots_R)
    for expert, (token_r, inner_rF, weights_r1, dots_r) in enumerate(rows):
        grad_rD = grad_ND.index_select(0, token_r).to(wide)
        grad_hidden_rF = grad_rD @ fc2[expert].to(wide).t()
        hidden_rF, grad_inner_rF, found_r = gate_gradients(inner_rF.to(wide), grad_hidden_rF, weights_r1)
        if found_r is not None:
            dots_r.copy_(found_r)
        if needs_x:
            _add_product(grad_x_ND, token_r, grad_inner_rF, fc1[expert].to(wide).t())
        if needs_fc1:
            _product(x_ND.index_select(0, token_r).to(wide).t(), grad_inner_rF, grads[2][expert])
        if needs_fc2:
            _product(hidden_rF.t(), grad_rD, grads[3][expert])
    if needs_x:
        grads[0] = grad_x_ND.to(x_ND.dtype)
    if weights_NK is not None:
        grads[1] = dots_R[row_NK].to(weights_NK.dtype)
    return grads


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right`, written to `out` and rounded as that is; returned as wide as it came."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(left @ right).to(left.dtype)


def _add_product(sum_ND: Tensor, token_r: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` to the rows `token_r`, none of which is named twice: a token has an expert once."""
    sum_ND.index_copy_(0, token_r, sum_ND.index_select(0, token_r).addmm_(left, right))


def _by_expert(lengths: list[int], *values: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The rows of each expert. An idle one has none, but its turn: its gradients must be written as zeros."""
    cut = ([None] * len(lengths) if value is None else torch.split(value, lengths) for value in values)
    return zip(*cut, strict=True)


def _inner(x_ND: Tensor, fc1: Tensor, token_R: Tensor) -> Tensor:
    return x_ND.new_empty(token_R.shape[0], fc1.shape[-1])


def _gradients(needed: list[bool], *inputs: Tensor | None) -> list[Tensor]:
    """Uninitialised; something must stand even for weights that are not there."""
    anything = next(value for value in inputs if value is not None)
    return [
        anything.new_empty(0) if value is None or not wanted else torch.empty_like(value)
        for value, wanted in zip(inputs, needed, strict=True)
    ]


@looped_experts.register_fake
def _(
    x_ND: Tensor,
    weights_NK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    tokens_per_expert_E: Tensor,
    token_R: Tensor,
    row_NK: Tensor,
    choice_R: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), _inner(x_ND, fc1, token_R)


@looped_experts_backward.register_fake
def _(
    grad_ND: Tensor,
    inner_RF: Tensor,
    needed: list[bool],
    x_ND: Tensor,
    weights_NK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    tokens_per_expert_E: Tensor,
    token_R: Tensor,
    row_NK: Tensor,
    choice_R: Tensor,
) -> list[Tensor]:
    return _gradients(needed, x_ND, weights_NK, fc1, fc2)
