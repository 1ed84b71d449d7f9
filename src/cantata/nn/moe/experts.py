"""The experts of an MoE layer: E SwiGLU blocks whose matrices lie in two tensors.

R  rows, sorted by expert
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cantata.nn.matmul import product_dtype
from cantata.nn.mlp import swiglu


class Experts(nn.Module):
    """`num_experts` SwiGLU blocks without biases.

    `fc1` (E, D, 2F) holds [gate | up] and `fc2` (E, F, D), both in (in, out) order, which is what the
    grouped products take.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * intermediate_size))
        self.fc2 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(self, x_RD: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """Row r goes through its expert; the rows of expert 0 come first, then those of expert 1, ..."""
        product = grouped_product if can_group(x_RD, self.fc1, self.fc2) else looped_product
        return product(swiglu(product(x_RD, self.fc1, tokens_per_expert_E)), self.fc2, tokens_per_expert_E)


def can_group(x_RD: Tensor, *weights: Tensor) -> bool:
    """Whether the grouped kernel takes these: some rows, not fp64, strides of 16-byte multiples."""
    supported = x_RD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(w.shape[-1] * w.element_size() % 16 == 0 for w in (x_RD, *weights))
    return supported and aligned and x_RD.shape[0] > 0


def grouped_product(x_RD: Tensor, weight_EDF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, in one call, multiplied in `product_dtype(x)`."""
    ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    result: Tensor = _GroupedProduct.apply(x_RD, weight_EDF, ends_E)  # type: ignore[no-untyped-call]
    return result


class _GroupedProduct(torch.autograd.Function):
    """`grouped_mm` that may widen, and whose backward takes gradients of any strides."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EDF, ends_E)
        wide = product_dtype(x_RD)
        return F.grouped_mm(x_RD.to(wide), weight_EDF.to(wide), offs=ends_E).to(x_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight_EDF, ends_E = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        wide = product_dtype(x_RD)
        grad_RF = grad_RF.to(wide).contiguous()
        grad_x = grad_weight = None
        if needs_x:
            grad_x = F.grouped_mm(grad_RF, weight_EDF.to(wide).transpose(1, 2), offs=ends_E).to(x_RD.dtype)
        if needs_weight:
            grad_weight = F.grouped_mm(x_RD.to(wide).t(), grad_RF, offs=ends_E).to(weight_EDF.dtype)
        return grad_x, grad_weight, None


def looped_product(x_RD: Tensor, weight_EDF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """The same, one expert after another."""
    parts = torch.split(x_RD, tokens_per_expert_E.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weight_EDF, strict=True)])
