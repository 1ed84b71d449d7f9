"""The plain vector quantiser: the nearest of K learnt codes.

N  rows    D  width of a row    K  codes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cantata.core.suggest import hint
from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.common import (
    bad,
    check_size,
    check_weight,
    fp32,
    rotated,
    squared_error,
    straight_through,
    unit,
)
from cantata.nn.quantize.nearest import nearest_codes

GRADIENTS = {"straight_through": straight_through, "rotation": rotated}
"""How the gradient of the values reaches the rows."""


class VectorQuantizer(Quantizer):
    """Each row becomes its nearest code (van den Oord et al. 2017, arXiv:1711.00937).

    A row loses `mean((e - sg[z])^2) + commitment * mean((sg[e] - z)^2)`, the means being over D.

    With `l2_normalize`, rows and codes are brought to length 1 before anything else, so that the nearest code
    is the one of the most similar direction (ViT-VQGAN, arXiv:2110.04627; LlamaGen, arXiv:2406.06525). Values
    are then unit rows, and the gradient reaches the input through the normalisation.

    `gradient` is `straight_through` or `rotation` (arXiv:2410.06424).
    """

    def __init__(
        self, num_codes: int, dim: int, commitment: float, l2_normalize: bool, gradient: str
    ) -> None:
        """Raises `ConfigError` for sizes, weights or a gradient that cannot be."""
        super().__init__()
        check_size("num_codes", num_codes, 2)
        check_size("dim", dim, 1)
        check_weight("commitment", commitment)
        if gradient not in GRADIENTS:
            raise bad("gradient", gradient, f"one of {', '.join(GRADIENTS)}{hint(gradient, GRADIENTS)}")
        self.num_codes = num_codes
        self.dim = dim
        self.commitment = commitment
        self.l2_normalize = l2_normalize
        self.gradient = gradient
        self.codebook_KD = nn.Parameter(torch.empty(num_codes, dim))

    @property
    def rule(self) -> str:
        return f"{super().rule} of rows of length 1" if self.l2_normalize else super().rule

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            rows_ND, codes_KD = z_ND.float(), self._codes()
            if self.l2_normalize:
                rows_ND = unit(rows_ND)
            indices_N = nearest_codes(rows_ND, codes_KD)
            # Unlike an index, an embedding has a gradient that is the same in every run on a GPU.
            codes_ND = F.embedding(indices_N, codes_KD)
            codebook = squared_error(codes_ND, rows_ND.detach())
            commitment = squared_error(codes_ND.detach(), rows_ND)
            values_ND = GRADIENTS[self.gradient](rows_ND, codes_ND).to(z_ND.dtype)
        return Quantized(
            values_ND,
            indices_N,
            codebook + self.commitment * commitment,
            {"codebook": codebook.detach(), "commitment": commitment.detach()},
            usage(indices_N, self.num_codes),
            {},
        )

    def decode(self, indices_N: Tensor) -> Tensor:
        return F.embedding(indices_N, self._codes())

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Codes uniform in +-1/K, as van den Oord et al.: small, so that each can go wherever rows are.

        Normalised codes lose their length, and only a normal distribution leaves their directions even.
        """
        if name != "codebook_KD":
            raise KeyError(name)
        if self.l2_normalize:
            tensor.copy_(unit(tensor.normal_(generator=generator)))
        else:
            tensor.uniform_(-1 / self.num_codes, 1 / self.num_codes, generator=generator)

    def _codes(self) -> Tensor:
        codes_KD = self.codebook_KD.float()
        return unit(codes_KD) if self.l2_normalize else codes_KD
