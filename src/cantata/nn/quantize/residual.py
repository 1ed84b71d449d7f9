"""Several codes a row, each for what the ones before it left over.

N  rows    D  width of a row    K  codes of a codebook    R  codebooks
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.common import check_size, fp32, straight_through
from cantata.nn.quantize.vq import VectorQuantizer


class ResidualQuantizer(Quantizer):
    """A row becomes the sum of R codes: the nearest one, then the nearest to the rest, and so on.

    Lee et al. 2022, arXiv:2203.01941, 3.1. A row loses what `VectorQuantizer` says of each rest, summed over
    codebooks; the rest being `z - sg[sum of the codes before]`, that is also the commitment of z to every
    partial sum. Means are over D.

    With `shared_codebook` all R codes of a row come from one codebook, as in the paper.
    """

    def __init__(
        self, num_codes: int, dim: int, num_codebooks: int, commitment: float, shared_codebook: bool
    ) -> None:
        """Raises `ConfigError` for sizes or weights that cannot be."""
        super().__init__()
        check_size("num_codebooks", num_codebooks, 1)
        self.num_codes = num_codes
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.commitment = commitment
        self.shared_codebook = shared_codebook
        self.codebooks = nn.ModuleList(
            VectorQuantizer(num_codes, dim, commitment, l2_normalize=False, gradient="straight_through")
            for _ in range(1 if shared_codebook else num_codebooks)
        )

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            rest_ND = rows_ND = z_ND.float()
            steps = []
            for depth in range(self.num_codebooks):
                steps.append(self._codebook(depth)(rest_ND))
                rest_ND = rest_ND - steps[-1].values_ND.detach()
            values_ND = _sum([step.values_ND.detach() for step in steps])
            indices_NR = torch.stack([step.indices_N for step in steps], 1)
            return Quantized(
                straight_through(rows_ND, values_ND).to(z_ND.dtype),
                indices_NR,
                _sum([step.loss_sum for step in steps]),
                {name: _sum([step.parts[name] for step in steps]) for name in steps[0].parts},
                usage(indices_NR, self.num_codes),
                {},
            )

    def decode(self, indices_NR: Tensor) -> Tensor:
        return _sum([self._codebook(r).decode(column) for r, column in enumerate(indices_NR.unbind(-1))])

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """As `VectorQuantizer`: rests have no known size, and small codes can go wherever they are."""
        depth, _, inner = name.removeprefix("codebooks.").partition(".")
        if not depth.isdigit():
            raise KeyError(name)
        self._codebook(int(depth)).init_parameter(inner, tensor, generator)

    def _codebook(self, depth: int) -> VectorQuantizer:
        return cast(VectorQuantizer, self.codebooks[depth % len(self.codebooks)])


def _sum(values: list[Tensor]) -> Tensor:
    """Always in the order of the codebooks, so that decoding repeats what forward gave."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
