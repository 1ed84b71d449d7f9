"""A linear layer plus a product of low rank, in one pass; and DoRA, which scales their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cantata.nn.lora.settings import LoRASettings
from cantata.nn.matmul import Linear, product_dtype
from cantata.nn.moe.low_rank import kept_only


class LoRALinear(Linear):
    """`x W^T + bias + scaling dropout(x) A^T B^T`.

    With DoRA (Liu et al., 2024, arXiv:2402.09353) what the two weights give is scaled, output by output, to
    the learned magnitude: `m / |W + scaling B A|`, whose norm counts as a constant (section 4.3 there). Kept
    is how far m is from the base's, `m = (1 + lora_magnitude) |W|`: near zero half precision is as fine as
    what is learned, and an adapter that has learned nothing changes no bit.

    `lora_A` (r, in), `lora_B` (out, r), with DoRA `lora_magnitude` (out,). Made by `adapt`.
    """

    settings: LoRASettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter

    def add_factors(self, settings: LoRASettings) -> None:
        """Register the factors, without values."""
        self.settings = settings
        self.lora_A = nn.Parameter(self.weight.new_empty(settings.r, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, settings.r))
        if settings.dora:
            self.lora_magnitude = nn.Parameter(self.weight.new_empty(self.out_features))

    def forward(self, x_TD: Tensor) -> Tensor:
        kept = self.settings.draw_kept(x_TD.shape, x_TD.device, self.training)
        a, b = self.lora_A.to(x_TD.dtype), self.lora_B.to(x_TD.dtype)
        b = b * self.settings.scale(kept)
        if not self.settings.dora:
            return adapted_linear(x_TD, self.weight, self.bias, a, b, kept)
        y = adapted_linear(x_TD, self.weight, None, a, b, kept)
        norms = row_norms(self.weight, self.lora_A, self.lora_B, self.settings.scaling)
        factor = dora_magnitude(self.weight, self.lora_magnitude) / norms
        y = (y * factor).to(y.dtype)
        return y if self.bias is None else y + self.bias


def adapted_linear(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, kept: Tensor | None
) -> Tensor:
    """`x W^T + bias + (x, where it is kept) A^T B^T`, multiplied in `product_dtype(x)`."""
    y: Tensor = _AdaptedLinear.apply(x_TD, weight, bias, a, b, kept)  # type: ignore[no-untyped-call]
    return y


def dora_magnitude(weight: Tensor, change: Tensor) -> Tensor:
    """`(1 + change) |W|` of each row, at least in fp32; W counts as a constant."""
    return (1 + change.to(torch.promote_types(change.dtype, torch.float32))) * _norms(weight)


@torch.no_grad()
def magnitude_change(weight: Tensor, magnitude: Tensor) -> Tensor:
    """What `dora_magnitude` makes this magnitude of."""
    norms = _norms(weight)
    return magnitude.to(norms) / norms - 1


@torch.no_grad()
def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(
        weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    return norms


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`|W + scaling B A|` of each row, at least in fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scaling)
    norms: Tensor = torch.linalg.vector_norm(merged, dim=1)
    return norms


class _AdaptedLinear(torch.autograd.Function):
    """Keeps x as it came (as other layers may too), for dropout a byte of each input, and `x A^T`."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, kept: Tensor | None
    ) -> Tensor:
        wide = product_dtype(x_TD)
        x = x_TD.to(wide)
        low = nn.functional.linear(kept_only(x, kept), a.to(wide))
        y = nn.functional.linear(x, weight.to(wide), None if bias is None else bias.to(wide))
        # A copy, since recomputation may keep what a product returns; in place, since it keeps products only.
        y = y.clone()
        y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.to(wide).t())
        ctx.save_for_backward(x_TD, weight, a, b, kept, low)
        return y.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight, a, b, kept, low = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        wide = low.dtype
        grad = grad.to(wide).flatten(0, -2)
        grad_low = grad @ b.to(wide)
        grad_x = grad_weight = grad_a = None
        if needs_x:
            grad_x = _input_gradient(grad, grad_low, weight.to(wide), a.to(wide), kept)
            grad_x = grad_x.to(x_TD.dtype).view(x_TD.shape)
        if needs_weight:
            grad_weight = (grad.t() @ x_TD.to(wide).flatten(0, -2)).to(weight.dtype)
        if needs_a:
            grad_a = (grad_low.t() @ kept_only(x_TD.to(wide), kept).flatten(0, -2)).to(a.dtype)
        grad_b = (grad.t() @ low.flatten(0, -2)).to(b.dtype) if needs_b else None
        return grad_x, grad_weight, grad.sum(0).to(weight.dtype) if needs_bias else None, grad_a, grad_b, None


def _input_gradient(grad: Tensor, grad_low: Tensor, weight: Tensor, a: Tensor, kept: Tensor | None) -> Tensor:
    grad_x = grad @ weight
    if kept is None:
        return grad_x.addmm_(grad_low, a)
    return grad_x.add_(kept_only(grad_low @ a, kept.flatten(0, -2)))
