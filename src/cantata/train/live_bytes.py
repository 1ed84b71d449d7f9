"""Counts the bytes that are alive while shapes run through a model, by what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_OPS = torch.ops._c10d_functional


class Purpose(Enum):
    """What bytes are for."""

    activations = auto()
    logits = auto()
    """What the language head makes: a chunk's logits, their softmax, and the gradients that follow."""
    all_to_all = auto()
    """Rows that leave for other ranks' experts, and those that have come, kept for backward or not."""
    gradients = auto()
    """What is left of gradients once they are reduced."""


class Held:
    """A storage's bytes, 0 once it is gone."""

    __slots__ = ("purpose", "size")

    def __init__(self, size: int, purpose: Purpose) -> None:
        self.size = size
        self.purpose = purpose


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operator makes, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.purpose = Purpose.activations
        self.held = dict.fromkeys(Purpose, 0)
        self.now = 0
        self.peak = 0
        self.at_peak = dict(self.held)
        """Sums up to `peak`."""
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, Held] = weakref.WeakKeyDictionary()
        self._record: list[Held] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _OPS.wait_tensor.default:
            # In earnest it returns what it was given; without storage torch would make a copy.
            return args[0]
        given = [x.untyped_storage() for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        run = _grouped_product if func is torch.ops.aten._grouped_mm.default else func
        result = run(*args, **(kwargs or {}))
        travels = func is _OPS.all_to_all_single.default
        if travels:
            self._rename(given[0], Purpose.all_to_all)
        for value in tree_iter(result):
            if isinstance(value, Tensor) and not any(value.untyped_storage() is storage for storage in given):
                self._track(value.untyped_storage(), Purpose.all_to_all if travels else self.purpose)
        return result

    def add(self, size: int, purpose: Purpose) -> None:
        """Count bytes that no storage stands for; negative ones have gone."""
        self.now += size
        self.held[purpose] += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = dict(self.held)

    def during(self, module: nn.Module, purpose: Purpose) -> None:
        """Let what a module's forward makes count as something."""
        forward = module.forward

        def named(*args: Any, **kwargs: Any) -> Any:
            before, self.purpose = self.purpose, purpose
            try:
                return forward(*args, **kwargs)
            finally:
                self.purpose = before

        module.forward = named

    def recorded(self, call: Callable[[], Any]) -> tuple[Any, list[Held]]:
        """What a call returns, and every storage that it makes."""
        made: list[Held] = []
        self._record = made
        try:
            return call(), made
        finally:
            self._record = None

    def _track(self, storage: torch.UntypedStorage, purpose: Purpose) -> None:
        if storage in self._known:
            return
        held = Held(storage.nbytes(), purpose)
        self._known[storage] = held
        if self._record is not None:
            self._record.append(held)
        self.add(held.size, purpose)
        weakref.finalize(storage, self._forget, held)

    def _forget(self, held: Held) -> None:
        self.add(-held.size, held.purpose)
        held.size = 0

    def _rename(self, storage: torch.UntypedStorage, purpose: Purpose) -> None:
        held = self._known.get(storage)
        if held is not None and held.purpose is not purpose:
            self.held[held.purpose] -= held.size
            self.held[purpose] += held.size
            held.purpose = purpose


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The result's shape, in any dtype: torch's own version for tensors without storage takes bf16 alone.

    Two matrices are cut along what they share, one product for each group; else each group has its matrix.
    """
    groups = (offs.numel(),) if left.dim() == right.dim() == 2 else ()
    return left.new_empty(*groups, left.shape[-2], right.shape[-1])
