"""Compile the repeated blocks."""

from __future__ import annotations

import torch
from torch import nn

from cantata.nn.moe.experts import Experts


def apply_compile(module: nn.Module, device_type: str) -> None:
    """Compile a block's forward; equal blocks share one graph, and parameter names stay as they are.

    Only forward is compiled, not the module's call: the hooks that gather parameters around the
    block run collectives, which do not belong into its graph. On CPU the experts run as they are: the
    compiler believes that grouped products take bf16 alone there.
    """
    if device_type == "cpu":
        for part in module.modules():
            if isinstance(part, Experts):
                eager = torch.compiler.disable(part.forward)  # type: ignore[no-untyped-call]
                part.forward = eager  # type: ignore[method-assign]
    module.forward = torch.compile(module.forward)
