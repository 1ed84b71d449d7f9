"""The experts one after another: for processors, whose caches hold one expert's share.

N  tokens    K  rows of each token    R  rows, sorted by expert    r  rows of one expert

Finishing each product for all rows before the next one starts would send every value in between through main
memory, and widening the weights of all experts at once every weight. The two operators are opaque to the
compiler, to recomputation and to tensors without values, none of which could follow a loop over counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from cantata.nn.matmul import product_dtype
from cantata.nn.mlp import gate, gate_gradients
from cantata.nn.moe.dispatch import by_row
from cantata.nn.moe.low_rank import Flat, LowRank, factors, kept_only, pairs


@library.custom_op(
    "cantata::experts",
    mutates_args=(),
    schema="(Tensor x_ND, Tensor? weights_NK, Tensor fc1, Tensor fc2, Tensor tokens_per_expert_E,"
    " Tensor token_R, Tensor row_NK, Tensor choice_R, Tensor?[] low) -> (Tensor, Tensor)",
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
    low: Flat,
) -> tuple[Tensor, Tensor]:
    """The (weighted) sum of each token's results, and fc1's outputs, multiplied in `product_dtype(x)`.

    `low` is added to fc1 and fc2: see `low_rank`.
    """
    wide = product_dtype(x_ND)
    y_ND = x_ND.new_zeros(x_ND.shape, dtype=wide)
    inner_RF = _inner(x_ND, fc1, token_R)
    low1, low2 = pairs(low)
    values = token_R, inner_RF, by_row(weights_NK, choice_R), _kept(low2)
    rows = _by_expert(tokens_per_expert_E.tolist(), *values)
    for expert, (token_r, inner_rF, weights_r1, kept_rF) in enumerate(rows):
        if not len(token_r):
            continue
        mine1, mine2 = _of_tokens(low1, expert, token_r, wide), _of_rows(low2, expert, kept_rF, wide)
        x_rD = x_ND.index_select(0, token_r).to(wide)
        wide_rF = _product(x_rD, fc1[expert].to(wide), inner_rF, _through_a(x_rD, mine1))
        hidden_rF = gate(wide_rF, weights_r1)
        _add_product(y_ND, token_r, hidden_rF, fc2[expert].to(wide), _through_a(hidden_rF, mine2))
    return y_ND.to(x_ND.dtype), inner_RF


@library.custom_op(
    "cantata::experts_backward",
    mutates_args=(),
    schema="(Tensor grad_ND, Tensor inner_RF, bool[] needed, Tensor x_ND, Tensor? weights_NK, Tensor fc1,"
    " Tensor fc2, Tensor tokens_per_expert_E, Tensor token_R, Tensor row_NK, Tensor choice_R, Tensor?[] low)"
    " -> Tensor[]",
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
    low: Flat,
) -> list[Tensor]:
    """The gradients of x, the weights, fc1 and fc2, then of the factors in `low`.

    An empty tensor stands for one that is not needed.
    """
    wide = product_dtype(x_ND)
    needs_x, _, needs_fc1, needs_fc2, needs_low1, needs_low2 = needed
    grads = _gradients(needed, x_ND, weights_NK, fc1, fc2, low)
    grad_x_ND = x_ND.new_zeros(x_ND.shape if needs_x else 0, dtype=wide)
    dots_R = inner_RF.new_empty(len(inner_RF), dtype=torch.float32)
    low1, low2 = pairs(low)
    values = token_R, inner_RF, by_row(weights_NK, choice_R), dots_R, _kept(low2)
    rows = _by_expert(tokens_per_expert_E.tolist(), *values)
    for expert, (token_r, inner_rF, weights_r1, dots_r, kept_rF) in enumerate(rows):
        mine1, mine2 = _of_tokens(low1, expert, token_r, wide), _of_rows(low2, expert, kept_rF, wide)
        grad_rD = grad_ND.index_select(0, token_r).to(wide)
        added2 = _through_b(grad_rD, mine2)
        grad_hidden_rF = _add(grad_rD @ fc2[expert].to(wide).t(), added2)
        hidden_rF, grad_inner_rF, found_r = gate_gradients(inner_rF.to(wide), grad_hidden_rF, weights_r1)
        if found_r is not None:
            dots_r.copy_(found_r)
        added1 = _through_b(grad_inner_rF, mine1)
        if needs_x:
            _add_product(grad_x_ND, token_r, grad_inner_rF, fc1[expert].to(wide).t(), added1)
        if needs_fc1:
            _product(x_ND.index_select(0, token_r).to(wide).t(), grad_inner_rF, grads[2][expert])
        if needs_fc2:
            _product(hidden_rF.t(), grad_rD, grads[3][expert])
        if needs_low1:
            x_rD = x_ND.index_select(0, token_r).to(wide)
            _factor_gradients(x_rD, grad_inner_rF, mine1, added1, [grad[expert] for grad in grads[4:6]])
        if needs_low2:
            _factor_gradients(hidden_rF, grad_rD, mine2, added2, [grad[expert] for grad in grads[6:]])
    if needs_x:
        grads[0] = grad_x_ND.to(x_ND.dtype)
    if weights_NK is not None:
        grads[1] = dots_R[row_NK].to(weights_NK.dtype)
    return grads


class _Added(NamedTuple):
    """`left @ right`, zero where it is not kept, to be added to a product."""

    left: Tensor
    right: Tensor
    kept: Tensor | None


def _through_a(x_rI: Tensor, low: LowRank | None) -> _Added | None:
    return None if low is None else _Added(kept_only(x_rI, low.kept) @ low.a, low.b, None)


def _through_b(grad_rO: Tensor, low: LowRank | None) -> _Added | None:
    return None if low is None else _Added(grad_rO @ low.b.t(), low.a.t(), low.kept)


def _add(sum_rO: Tensor, added: _Added | None) -> Tensor:
    if added is None:
        return sum_rO
    if added.kept is None:
        return sum_rO.addmm_(added.left, added.right)
    return sum_rO.add_(kept_only(added.left @ added.right, added.kept))


def _factor_gradients(
    x_rI: Tensor, grad_rO: Tensor, low: LowRank | None, through_b: _Added | None, out: list[Tensor]
) -> None:
    assert low is not None
    assert through_b is not None
    x_rI = kept_only(x_rI, low.kept)
    _product(x_rI.t(), through_b.left, out[0])
    _product((x_rI @ low.a).t(), grad_rO, out[1])


def _kept(low: LowRank | None) -> Tensor | None:
    return None if low is None else low.kept


def _of_rows(low: LowRank | None, expert: int, kept_rI: Tensor | None, wide: torch.dtype) -> LowRank | None:
    """What one expert gets."""
    return None if low is None else LowRank(low.a[expert].to(wide), low.b[expert].to(wide), kept_rI)


def _of_tokens(low: LowRank | None, expert: int, token_r: Tensor, wide: torch.dtype) -> LowRank | None:
    kept_ND = _kept(low)
    return _of_rows(low, expert, None if kept_ND is None else kept_ND.index_select(0, token_r), wide)


def _product(left: Tensor, right: Tensor, out: Tensor, added: _Added | None = None) -> Tensor:
    """`left @ right`, written to `out` and rounded as that is; returned as wide as it came."""
    if out.dtype == left.dtype:
        return _add(torch.mm(left, right, out=out), added)
    return out.copy_(_add(left @ right, added)).to(left.dtype)


def _add_product(sum_ND: Tensor, token_r: Tensor, left: Tensor, right: Tensor, added: _Added | None) -> None:
    """Adds `left @ right` to the rows `token_r`, none of which is named twice: a token has an expert once."""
    sum_ND.index_copy_(0, token_r, _add(sum_ND.index_select(0, token_r).addmm_(left, right), added))


def _by_expert(lengths: list[int], *values: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The rows of each expert. An idle one has none, but its turn: its gradients must be written as zeros."""
    cut = ([None] * len(lengths) if value is None else torch.split(value, lengths) for value in values)
    return zip(*cut, strict=True)


def _inner(x_ND: Tensor, fc1: Tensor, token_R: Tensor) -> Tensor:
    return x_ND.new_empty(token_R.shape[0], fc1.shape[-1])


def _gradients(needed: list[bool], x_ND: Tensor, weights_NK: Tensor | None, *rest: Any) -> list[Tensor]:
    """Uninitialised; something must stand even for what is not there."""
    fc1, fc2, low = rest
    inputs = [x_ND, weights_NK, fc1, fc2, *(factors(low) or [None] * 4)]
    wanted = [*needed[:4], *needed[4:5] * 2, *needed[5:] * 2]
    return [
        x_ND.new_empty(0) if value is None or not wants else torch.empty_like(value)
        for value, wants in zip(inputs, wanted, strict=True)
    ]


@looped_experts.register_fake
def _(x_ND: Tensor, weights_NK: Tensor | None, fc1: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    token_R = rest[2]
    return torch.empty_like(x_ND), _inner(x_ND, fc1, token_R)


@looped_experts_backward.register_fake
def _(grad_ND: Tensor, inner_RF: Tensor, needed: list[bool], *inputs: Any) -> list[Tensor]:
    return _gradients(needed, *inputs[:4], inputs[-1])
