"""Quantisers small enough to write out, filled as a model fills them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cantata.nn.quantize import (
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    IndexBackpropagationQuantizer,
    LookupFreeQuantizer,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

CODES, DIM = 8, 3
SIZE = {"num_codes": CODES, "dim": DIM, "commitment": 0.25}
ENTROPY = {"row_entropy": 0.3, "batch_entropy": 0.2, "entropy_temperature": 0.7}

KINDS: dict[str, tuple[Callable[..., Quantizer], dict[str, Any]]] = {
    "vq": (VectorQuantizer, SIZE | {"l2_normalize": False, "gradient": "straight_through"}),
    "l2_vq": (VectorQuantizer, SIZE | {"l2_normalize": True, "gradient": "straight_through"}),
    "rotation": (VectorQuantizer, SIZE | {"l2_normalize": False, "gradient": "rotation"}),
    "ema": (EMAVectorQuantizer, SIZE | {"decay": 0.9, "eps": 1e-5, "reset_below": 0.2}),
    "lfq": (
        LookupFreeQuantizer,
        {"num_codes": CODES, "commitment": 0.25, "group_bits": 3} | ENTROPY,
    ),
    "fsq": (FiniteScalarQuantizer, {"levels": [4, 3, 2]}),
    "ibq": (IndexBackpropagationQuantizer, SIZE | ENTROPY),
    "residual": (ResidualQuantizer, SIZE | {"num_codebooks": 3, "shared_codebook": False}),
    "shared": (ResidualQuantizer, SIZE | {"num_codebooks": 3, "shared_codebook": True}),
    "simvq": (SimVQ, SIZE),
}
"""A class and what its constructor takes, of every quantiser."""


def small(kind: str, seed: int = 0, **changes: Any) -> Quantizer:
    make, arguments = KINDS[kind]
    return filled(make(**(arguments | changes)), seed)


def filled(quantizer: Quantizer, seed: int = 0) -> Quantizer:
    """On the CPU, every tensor as `init_parameter` says; codes then spread out as far as rows are."""
    quantizer = quantizer.to_empty(device="cpu")
    with torch.no_grad():
        for number, (name, tensor) in enumerate([*quantizer.named_parameters(), *quantizer.named_buffers()]):
            quantizer.init_parameter(name, tensor, torch.Generator().manual_seed(100 * seed + number))
            if name.endswith("codebook_KD"):
                tensor.normal_(generator=torch.Generator().manual_seed(100 * seed + number))
    return quantizer


def rows(number: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(
    quantizer: Quantizer, z_ND: Tensor, weight_ND: Tensor
) -> tuple[Quantized, dict[str, Tensor | None]]:
    """What forward gives, and gradients of `sum(values * weight) + loss_sum` by name; `z` of the rows."""
    quantizer.zero_grad()
    z_ND.grad = None
    made = quantizer(z_ND)
    ((made.values_ND * weight_ND).sum() + made.loss_sum).backward()
    return made, {"z": z_ND.grad} | {name: p.grad for name, p in quantizer.named_parameters()}


def close(found: Any, wanted: Any, bound: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, check_dtype=False)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_iter(made) if isinstance(tensor, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made
