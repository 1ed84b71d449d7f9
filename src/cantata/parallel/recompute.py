"""Trade time for memory: forget activations and compute them again in backward."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Recompute(Enum):
    """What a block forgets in forward and computes again in backward."""

    none = "none"
    selective = "selective"
    """Keeps the outputs of matrix products, grouped products and attention; the rest is cheap."""
    full = "full"
    """Keeps the block's input and its routing only."""


# A second top-k over logits that differ in their last bit could pick other experts than forward did.
_ROUTING = frozenset({"aten::topk"})
_COSTLY = _ROUTING | {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn",
    "flex_attention",
}


def apply_recompute(module: nn.Module, mode: Recompute) -> None:
    """Make a block recompute its activations; the names of its parameters stay as they are.

    The forward itself is replaced on the instance, below any hook, so whatever gathers parameters
    around the block also serves the second run.
    """
    if mode is Recompute.none:
        return
    kept = _ROUTING if mode is Recompute.full else _COSTLY
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    forward: Callable[..., Any] = module.forward

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    module.forward = recomputing


def _policy(kept: frozenset[str], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator._schema.name if isinstance(operator, torch._ops.OpOverload) else operator.name()
    return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE
