"""Adapters with values, and the settings that tests share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cantata.nn.lora import LoRASettings, adapt, is_factor

PLAIN = LoRASettings(r=3, alpha=6.0, dropout=0.0, rslora=False, dora=False)
DROPPED = replace(PLAIN, dropout=0.4)
RSLORA = replace(PLAIN, rslora=True)
DORA = replace(PLAIN, dora=True)


def adapted(module: nn.Module, settings: LoRASettings | Mapping[str, LoRASettings]) -> nn.Module:
    """`adapt(module)` with random factors, all of them and the module's own parameters trained."""
    torch.manual_seed(1)
    twin = adapt(module, settings)
    with torch.no_grad():
        for name, parameter in twin.named_parameters(recurse=False):
            if is_factor(name):
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return twin


def assert_equal_to_a_millionth(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Of the largest value of each, at least of 1: what sums in another order leave of fp32."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        largest = float(torch.linalg.vector_norm(b.detach(), torch.inf)) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6 * max(1.0, largest))
