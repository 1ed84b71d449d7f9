"""What every quantiser is: rows of latents in, codes out.

N  rows (positions of all images of a micro-batch)    D  width of a row
K  codes of a codebook                                R  codebooks of a residual quantiser
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a quantiser makes of the rows of a micro-batch."""

    values_ND: Tensor
    """What the decoder reads, in the dtype of the input; its gradient goes straight through to the input."""
    indices_N: Tensor
    """The code of each row, int64; (N, R) of a residual quantiser."""
    loss_sum: Tensor
    """The quantiser's own losses, times their coefficients and summed over rows; fp32 scalar with gradient.

    It adds up over ranks and micro-batches: the objective divides by the step's number of rows."""
    parts: Mapping[str, Tensor]
    """The same sums one by one, without coefficients and gradient, by the name of the term; fp32 scalars."""
    usage_K: Tensor
    """Rows that got each code, int64; (R, K) of a residual quantiser."""
    statistics: Mapping[str, Tensor]
    """Sums over rows that `Quantizer.update` wants, to be added over the step's micro-batches and ranks."""


class Quantizer(nn.Module, ABC):
    """Replaces rows of `dim` values by the nearest of finitely many.

    Works in fp32, whatever the dtype of the rows and whether or not autocast is on. The rows of a micro-batch
    are those of this rank; what a loss needs of all ranks it reduces itself, and only where gradients are
    enabled, so that evaluation needs no rank to keep in step.
    """

    dim: int
    """Width of the rows that it takes and gives."""
    num_codes: int
    """K: codes of a codebook."""
    num_codebooks: int = 1
    """R: codes that a row becomes."""

    @property
    def rule(self) -> str:
        """What besides tensors decides which code a row gets."""
        return type(self).__name__

    @abstractmethod
    def forward(self, z_ND: Tensor) -> Quantized:
        """Quantise the rows of a micro-batch."""

    @abstractmethod
    def decode(self, indices_N: Tensor) -> Tensor:
        """The fp32 rows (N, D) that codes stand for: what forward gives for rows of these codes."""

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a whole parameter or buffer (persistent or not), by its name in this module."""
        raise KeyError(name)

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Learn from a step's statistics, the same on every rank; called once after each step.

        Most quantisers learn by gradients alone and have nothing to do here.
        """


def usage(indices_N: Tensor, num_codes: int) -> Tensor:
    """Rows that got each code, int64: (K,), or (R, K) for indices of (N, R)."""
    if indices_N.dim() == 2:
        return torch.stack([usage(column_N, num_codes) for column_N in indices_N.unbind(1)])
    # Not bincount, whose result has no shape before it has run: plans run without values.
    counts_K = indices_N.new_zeros(num_codes)
    return counts_K.index_add_(0, indices_N, torch.ones_like(indices_N))
