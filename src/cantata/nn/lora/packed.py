"""Frozen weights that rest in few bits (QLoRA: Dettmers et al., 2023, arXiv:2305.14314), whole while in use.

M  matrices of a weight: its experts, or 1    B  bytes of one    S  blocks of one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from cantata.nn.lora.blockwise import BLOCK, Packing, matrices, pack, sizes, unpack

_aten = torch.ops.aten


class PackedWeight(Tensor):
    """A weight that operators take as any other, and that is whole only while one of them runs.

    Autograd keeps it as it is, so what forward saves of it for backward are its packed bytes; backward
    unpacks them again. `copy_` packs what it is given. Each matrix of a stack is packed by itself: what a
    rank holds of the experts does not depend on which others it holds.
    """

    codes_MB: Tensor
    scales_MS: Tensor
    packing: Packing

    @staticmethod
    def __new__(
        cls, codes_MB: Tensor, scales_MS: Tensor, shape: Sequence[int], dtype: torch.dtype, packing: Packing
    ) -> PackedWeight:
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes_MB.device)
        made.codes_MB, made.scales_MS, made.packing = codes_MB, scales_MS, packing
        return made

    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: torch.dtype, packing: Packing, device: torch.device
    ) -> PackedWeight:
        """Without values.

        Args:
            shape: of a matrix, or of a stack of them.
            dtype: that it is unpacked to.
            packing: not `none`.
        """
        count, of_codes, blocks = sizes(shape, packing)
        codes_MB = torch.empty(count, of_codes, dtype=torch.uint8, device=device)
        scales_MS = torch.empty(count, blocks, dtype=torch.float32, device=device)
        return cls(codes_MB, scales_MS, shape, dtype, packing)

    def unpack(self) -> Tensor:
        """The whole weight, a tensor of its own."""
        if self.codes_MB.is_meta:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        count, elements = matrices(self.shape)
        flat = unpack(self.codes_MB.view(-1), self.scales_MS.view(-1), self.dtype, self.packing)
        return flat.view(count, -1)[:, :elements].reshape(self.shape)

    def fill(self, value: Tensor) -> None:
        """Pack `value`, rounded to this weight's dtype first."""
        if self.codes_MB.is_meta:
            return
        count, elements = matrices(self.shape)
        lacking = -elements % BLOCK[self.packing]
        # One by one: a stack of experts is the largest tensor there is.
        for index, matrix in enumerate(value.expand(self.shape).reshape(count, elements)):
            codes, scales = pack(F.pad(matrix.to(self.device, self.dtype), (0, lacking)), self.packing)
            self.codes_MB[index].copy_(codes)
            self.scales_MS[index].copy_(scales)

    def moved(self, device: torch.device, *, values: bool) -> PackedWeight:
        """Its twin on a device, with or without values."""
        parts = (self.codes_MB, self.scales_MS)
        codes, scales = (p.to(device) if values else torch.empty_like(p, device=device) for p in parts)
        return PackedWeight(codes, scales, self.shape, self.dtype, self.packing)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.packing.value}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and isinstance(args[1] if len(args) > 1 else None, PackedWeight):
            return _frozen_linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AT_REST and isinstance(args[0], PackedWeight):
            found = _AT_REST[func](*args, **kwargs)
            if found is not None:
                return found
        if _writes(func, args):
            raise TypeError(f"{func} would change a packed weight, which is frozen")
        whole_args, whole_kwargs = tree_map_only(PackedWeight, PackedWeight.unpack, (args, kwargs))
        return func(*whole_args, **whole_kwargs)


def _writes(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator changes a packed weight in place."""
    given = zip(func._schema.arguments, args, strict=False)
    return any(isinstance(value, PackedWeight) and about.is_write for about, value in given)


def _alias(weight: PackedWeight) -> PackedWeight:
    return PackedWeight(weight.codes_MB, weight.scales_MS, weight.shape, weight.dtype, weight.packing)


def _view(weight: PackedWeight, shape: Sequence[int]) -> PackedWeight | None:
    return _alias(weight) if tuple(shape) == tuple(weight.shape) else None


def _empty_like(
    weight: PackedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any
) -> PackedWeight | None:
    if dtype not in (None, weight.dtype):
        return None
    return weight.moved(weight.device if device is None else torch.device(device), values=False)


def _to_copy(
    weight: PackedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any
) -> PackedWeight | None:
    """Another device moves what rests; another dtype, or a copy, wants the whole weight."""
    if dtype not in (None, weight.dtype) or device is None or torch.device(device) == weight.device:
        return None
    return weight.moved(torch.device(device), values=True)


def _copy(weight: PackedWeight, value: Tensor, non_blocking: bool = False) -> PackedWeight:
    weight.fill(value.unpack() if isinstance(value, PackedWeight) else value)
    return weight


_AT_REST: dict[Any, Callable[..., PackedWeight | None]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.view.default: _view,
    _aten.empty_like.default: _empty_like,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy,
}
"""Operators that need no whole weight, unless they say None."""


def _frozen_linear(x_TD: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _FrozenLinear.apply(x_TD, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _FrozenLinear(torch.autograd.Function):
    """`F.linear`, which by itself would keep the whole weight, transposed."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x_TD, weight.unpack(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        grad_x = grad @ weight.unpack() if needs_x else None
        return grad_x, None, grad.flatten(0, -2).sum(0) if needs_bias else None
