"""What every comparison with transformers shares: bounds, relative errors, the reference itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cantata.core.errors import CantataError, ConfigError

LOGITS_BOUND = 1e-5
LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-4
"""Largest errors allowed in fp32; a gradient's is relative to the largest value of its parameter's."""

GRADIENT = "gradient of "
"""How the name of a gradient's check begins."""


class Check(NamedTuple):
    """One compared quantity."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def relative_error(value: Tensor, reference: Tensor, scale_of: Tensor) -> float:
    """Largest difference over the largest absolute value of `scale_of`."""
    scale = float(scale_of.abs().max())
    difference = float((value - reference).abs().max())
    return difference / scale if scale else difference


def transformers_model(directory: Path, kind: str, **options: Any) -> Any:
    """transformers' model of class `kind`, in fp32.

    Raises `ConfigError` where transformers is not installed, `CantataError` where it does not find its keys.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("cantata verify compares with transformers, which is not installed here") from error
    model, report = getattr(transformers, kind).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    lost = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if lost:
        raise CantataError(f"{directory}: transformers does not find its own keys: {', '.join(lost[:10])}")
    return model
