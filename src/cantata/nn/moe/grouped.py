"""The experts together, one call for each product: for devices, which are kept waiting by loops over counts.

N  tokens    K  rows of each token    R  rows, sorted by expert    I  inputs and    O  outputs of a product
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, library

from cantata.nn.mlp import gate, gate_gradients
from cantata.nn.moe.dispatch import by_row, sum_rows
from cantata.nn.moe.low_rank import Flat, LowRank, kept_only, pairs


def grouped_experts(
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
    """`looped_experts` with one call for each product, without waiting for the device."""
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    low1, low2 = _by_row(low, token_R)
    inner_RF = _product(x_ND.index_select(0, token_R), fc1, ends_E, low1)
    hidden_RF = gate(inner_RF, by_row(weights_NK, choice_R))
    return sum_rows(_product(hidden_RF, fc2, ends_E, low2), row_NK), inner_RF


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
    low: Flat,
) -> list[Tensor | None]:
    """The gradients of x, the weights, fc1 and fc2, then of the factors in `low`, where they are needed."""
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    low1, low2 = _by_row(low, token_R)
    needs_x, _, needs_fc1, needs_fc2, needs_low1, needs_low2 = needed
    grads: list[Tensor | None] = [None] * 8
    grad_RD = grad_ND.index_select(0, token_R)
    grad_low2_Rr = _low_gradient(grad_RD, ends_E, low2)
    grad_hidden_RF = _input_gradient(grad_RD, fc2, ends_E, low2, grad_low2_Rr)
    hidden_RF, grad_inner_RF, dots_R = gate_gradients(inner_RF, grad_hidden_RF, by_row(weights_NK, choice_R))
    if needs_fc2:
        grads[3] = F.grouped_mm(hidden_RF.t(), grad_RD, offs=ends_E)
    if needs_low2:
        grads[6:] = _factor_gradients(hidden_RF, grad_RD, ends_E, low2, grad_low2_Rr)
    del grad_RD, grad_hidden_RF, hidden_RF
    grad_low1_Rr = _low_gradient(grad_inner_RF, ends_E, low1)
    if needs_fc1:
        grads[2] = F.grouped_mm(x_ND.index_select(0, token_R).t(), grad_inner_RF, offs=ends_E)
    if needs_low1:
        x_RD = x_ND.index_select(0, token_R)
        grads[4:6] = _factor_gradients(x_RD, grad_inner_RF, ends_E, low1, grad_low1_Rr)
        del x_RD
    if needs_x:
        grads[0] = sum_rows(_input_gradient(grad_inner_RF, fc1, ends_E, low1, grad_low1_Rr), row_NK)
    if weights_NK is not None and dots_R is not None:
        grads[1] = dots_R[row_NK].to(weights_NK.dtype)
    return grads


def _by_row(low: Flat, token_R: Tensor) -> tuple[LowRank | None, LowRank | None]:
    """What fc1 and fc2 get, both by row."""
    low1, low2 = pairs(low)
    if low1 is not None and low1.kept is not None:
        low1 = low1._replace(kept=low1.kept.index_select(0, token_R))
    return low1, low2


def _product(x_RI: Tensor, weight: Tensor, ends_E: Tensor, low: LowRank | None) -> Tensor:
    if low is None:
        return F.grouped_mm(x_RI, weight, offs=ends_E)
    added_RO: Tensor = grouped_low_rank(kept_only(x_RI, low.kept), low.a, low.b, ends_E)
    # Not the other way round: recomputation keeps what a grouped product returns, which must stay as it is.
    return added_RO.add_(F.grouped_mm(x_RI, weight, offs=ends_E))


@library.custom_op("cantata::grouped_low_rank", mutates_args=())
def grouped_low_rank(x_RI: Tensor, a_EIr: Tensor, b_ErO: Tensor, ends_E: Tensor) -> Tensor:
    """`x a b`: an operator by itself because it is too cheap for recomputation to keep its large result."""
    low_Rr = F.grouped_mm(x_RI, a_EIr, offs=ends_E)
    return F.grouped_mm(low_Rr, b_ErO, offs=ends_E)


@grouped_low_rank.register_fake
def _(x_RI: Tensor, a_EIr: Tensor, b_ErO: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], b_ErO.shape[2])


def _low_gradient(grad_RO: Tensor, ends_E: Tensor, low: LowRank | None) -> Tensor | None:
    """The gradient of `x a`."""
    return None if low is None else F.grouped_mm(grad_RO, low.b.transpose(1, 2), offs=ends_E)


def _input_gradient(
    grad_RO: Tensor, weight: Tensor, ends_E: Tensor, low: LowRank | None, grad_low_Rr: Tensor | None
) -> Tensor:
    grad_RI = F.grouped_mm(grad_RO, weight.transpose(1, 2), offs=ends_E)
    if low is None or grad_low_Rr is None:
        return grad_RI
    return grad_RI.add_(kept_only(F.grouped_mm(grad_low_Rr, low.a.transpose(1, 2), offs=ends_E), low.kept))


def _factor_gradients(
    x_RI: Tensor, grad_RO: Tensor, ends_E: Tensor, low: LowRank | None, grad_low_Rr: Tensor | None
) -> list[Tensor | None]:
    if low is None or grad_low_Rr is None:
        return [None, None]
    x_RI = kept_only(x_RI, low.kept)
    low_Rr = F.grouped_mm(x_RI, low.a, offs=ends_E)
    return [
        F.grouped_mm(x_RI.t(), grad_low_Rr, offs=ends_E),
        F.grouped_mm(low_Rr.t(), grad_RO, offs=ends_E),
    ]
