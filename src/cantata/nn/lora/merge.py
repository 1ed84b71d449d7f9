"""Adapters as changes of whole weights, in fp32 (or wider), one weight at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from cantata.nn.lora.linear import dora_magnitude, row_norms


def linear_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Of a linear layer or a head, (out, in), from `lora_A` (r, in) and `lora_B` (out, r)."""
    return _wide(b) @ _wide(a) * scaling


def embedding_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Of an embedding, (V, D), from `lora_A` (r, V) and `lora_B` (D, r)."""
    return _wide(a).t() @ _wide(b).t() * scaling


def experts_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Of experts, (E, in, out), from A (E, in, r) and B (E, r, out); of one expert without the E."""
    return _wide(a) @ _wide(b) * scaling


def dora_weight(weight: Tensor, a: Tensor, b: Tensor, change: Tensor, scaling: float) -> Tensor:
    """A linear layer's whole weight (out, in) with DoRA, from `lora_magnitude` too; it is no sum."""
    factor = dora_magnitude(weight, change) / row_norms(weight, a, b, scaling)
    return (_wide(weight) + linear_delta(a, b, scaling)).mul_(factor[:, None])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
