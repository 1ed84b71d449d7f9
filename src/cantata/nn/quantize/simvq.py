"""Codes that move together: a fixed random codebook times one learnt matrix.

N  rows    D  width of a row    K  codes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.common import check_size, check_weight, fp32, squared_error, straight_through
from cantata.nn.quantize.nearest import nearest_codes


class SimVQ(Quantizer):
    """The nearest row of `C W`, of which C is fixed and W learnt (Zhu et al. 2024, arXiv:2411.02038).

    Whatever code a row meets, its gradient moves W and so all codes: none is left behind. A row loses
    `mean((e - sg[z])^2) + commitment * mean((sg[e] - z)^2)`, the means being over D.
    """

    codebook_KD: Tensor

    def __init__(self, num_codes: int, dim: int, commitment: float) -> None:
        """Raises `ConfigError` for sizes or weights that cannot be."""
        super().__init__()
        check_size("num_codes", num_codes, 2)
        check_size("dim", dim, 1)
        check_weight("commitment", commitment)
        self.num_codes = num_codes
        self.dim = dim
        self.commitment = commitment
        self.register_buffer("codebook_KD", torch.empty(num_codes, dim))
        self.weight_DD = nn.Parameter(torch.empty(dim, dim))

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            rows_ND, codes_KD = z_ND.float(), self._codes()
            indices_N = nearest_codes(rows_ND, codes_KD)
            codes_ND = F.embedding(indices_N, codes_KD)
            codebook = squared_error(codes_ND, rows_ND.detach())
            commitment = squared_error(codes_ND.detach(), rows_ND)
            values_ND = straight_through(rows_ND, codes_ND).to(z_ND.dtype)
        return Quantized(
            values_ND,
            indices_N,
            codebook + self.commitment * commitment,
            {"codebook": codebook.detach(), "commitment": commitment.detach()},
            usage(indices_N, self.num_codes),
            {},
        )

    def decode(self, indices_N: Tensor) -> Tensor:
        with fp32(indices_N.device):
            return F.embedding(indices_N, self._codes())

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Codes normal with a variance of 1/D, about 1 long; W starts by leaving them as they are."""
        if name == "codebook_KD":
            tensor.normal_(0.0, self.dim**-0.5, generator=generator)
        elif name == "weight_DD":
            nn.init.eye_(tensor)
        else:
            raise KeyError(name)

    def _codes(self) -> Tensor:
        return self.codebook_KD.float() @ self.weight_DD.float()
