"""Linear layers, and in which precision matrix products run."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply `x` in: its own, or fp32 where the processor is slower at half precision.

    Products accumulate in fp32 either way, so the result is the same up to the order of the sums.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and x.device.type == "cpu" and not _FAST_HALF_PRODUCTS else x.dtype


def _fast_half_products() -> bool:
    # Decided by what the processor is, never by a stopwatch: a resumed run must round as the first one did.
    # Intel's AVX512-BF16 without AMX runs at half the speed of fp32 (measured); AMD's at about twice it.
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported():
        return True
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return is_amd and torch.cpu._is_avx512_bf16_supported()


# Known before anything is compiled: a compiler would follow the reading of files into its graphs.
_FAST_HALF_PRODUCTS = _fast_half_products()


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, multiplied in `product_dtype(x)`."""
    if product_dtype(x_TD) == x_TD.dtype:
        return F.linear(x_TD, weight, bias)
    result: Tensor = _WideLinear.apply(x_TD, weight, bias)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies in `product_dtype(x)`."""

    if TYPE_CHECKING:

        def __call__(self, x_TD: Tensor) -> Tensor: ...

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight, self.bias)


class _WideLinear(torch.autograd.Function):
    """Products in fp32 of half-precision tensors; what is kept for backward stays in half precision."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x_TD.float(), weight.float(), wide_bias).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.float()
        flat = grad.flatten(0, -2)
        grad_x = (grad @ weight.float()).to(x_TD.dtype) if needs_x else None
        grad_weight = (flat.t() @ x_TD.float().flatten(0, -2)).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, flat.sum(0).to(weight.dtype) if needs_bias else None
