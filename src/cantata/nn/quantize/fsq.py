"""No codebook at all: each value of a row is rounded to one of a few levels.

N  rows    D  width of a row, one for each number of levels    K  codes: the product of the levels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.common import bad, fp32, straight_through

_MARGIN = 1e-3
"""How far beyond its outermost levels a value may go, as a share of their distance: rounding reaches them."""


class FiniteScalarQuantizer(Quantizer):
    """Rounds a bounded row, value by value (Mentzer et al. 2023, arXiv:2309.15505).

    A value with L levels becomes `h tanh(z + s) - o` with `h = 1.001 (L - 1) / 2`, is rounded, and divided by
    `L // 2` for a range of -1 to 1. Of an even L the offset o is 1/2, and `s = atanh(o / h)` lets 0 stay 0;
    of an odd one both are 0. (The paper's listing has 0.999 and tan in these places; as in later
    implementations the bound here reaches the outermost levels, and s is the true inverse, also for L = 2.)

    Rounding lets gradients straight through; they reach the input through the tanh. There is no loss. The
    code is `sum_d(digit_d * L_1 ... L_(d-1))`: the first value's digit is the lowest.
    """

    levels_D: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        """Raises `ConfigError` for levels that are none or below 2."""
        super().__init__()
        if not levels or min(levels) < 2:
            raise bad("levels", list(levels), "one number for each value of a row, each at least 2")
        self.levels = tuple(levels)
        self.dim = len(self.levels)
        self.num_codes = math.prod(self.levels)
        self.register_buffer("levels_D", torch.tensor(self.levels), persistent=False)

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            bounded_ND = self._bound(z_ND.float())
            rounded_ND = bounded_ND.round()
            middle_D = self.levels_D // 2
            values_ND = straight_through(bounded_ND, rounded_ND) / middle_D
            digits_ND = rounded_ND.detach().long() + middle_D
            indices_N = (digits_ND * self._place_D()).sum(-1)
        zero = values_ND.new_zeros(())
        return Quantized(values_ND.to(z_ND.dtype), indices_N, zero, {}, usage(indices_N, self.num_codes), {})

    def decode(self, indices_N: Tensor) -> Tensor:
        middle_D = self.levels_D // 2
        digits_ND = indices_N[..., None] // self._place_D() % self.levels_D
        return (digits_ND - middle_D).float() / middle_D

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """The one buffer is a table of what the config says."""
        if name != "levels_D":
            raise KeyError(name)
        tensor.copy_(torch.tensor(self.levels))

    def _bound(self, z_ND: Tensor) -> Tensor:
        # In fp64: atanh near 1, of two levels, would multiply a rounding of its argument by 500.
        half_D = (self.levels_D - 1).double() * ((1 + _MARGIN) / 2)
        offset_D = (1 - self.levels_D % 2).double() / 2
        shift_D = (offset_D / half_D).atanh()
        return half_D.float() * (z_ND + shift_D.float()).tanh() - offset_D.float()

    def _place_D(self) -> Tensor:
        return self.levels_D.cumprod(0) // self.levels_D
