"""Compile the repeated blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cantata.nn.moe.exchange import ExchangeDispatcher
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer


def apply_compile(module: nn.Module, device_type: str) -> None:
    """Compile a block's forward; equal blocks share one graph, and parameter names stay as they are.

    Only forward is compiled, not the module's call: the hooks that gather parameters around the
    block run collectives, which do not belong into its graph. An exchange runs as it is, since the host must
    know its sizes, and on CPU so do the experts: the compiler believes that grouped products take bf16 alone
    there.
    """
    for part in module.modules():
        if isinstance(part, Experts) and device_type == "cpu":
            _run_as_is(part, "forward")
        if isinstance(part, MoELayer) and isinstance(part.dispatcher, ExchangeDispatcher):
            _run_as_is(part.dispatcher, "send", "receive", "combine")
    module.forward = torch.compile(module.forward)


def _run_as_is(owner: Any, *methods: str) -> None:
    for name in methods:
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))  # type: ignore[no-untyped-call]
