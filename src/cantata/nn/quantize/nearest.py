"""The best code of each row, without the N x K matrix of distances.

N  rows    D  width of a row    K  codes
"""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_BLOCK = (256, 1024)
"""Rows and codes of a block on the CPU: 1 MiB of fp32, about what its second cache holds."""
_BLOCK = (4096, 16384)
"""The same elsewhere: 256 MiB, enough to keep a large device busy."""


@torch.no_grad()
def nearest_codes(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """Index of the code at the least Euclidean distance from each row, int64; the lowest of equals.

    It is the least `|e|^2 - 2 z.e` in fp32, as wherever such distances are made by a matrix product. Codes
    whose `|z - e|^2` differ by less than that rounds, some `1e-7 (|z| + |e|)^2`, count as equals in no
    particular order; equal rows of the codebook are exact ties.
    """
    codes_KD = codes_KD.float()
    return _search(z_ND.float(), codes_KD, codes_KD.square().sum(1))


def _search(z_ND: Tensor, codes_KD: Tensor, offset_K: Tensor) -> Tensor:
    """The least `offset - 2 z.e` of each row."""
    rows, codes = _CPU_BLOCK if z_ND.device.type == "cpu" else _BLOCK
    blocks = list(zip(torch.split(codes_KD, codes), torch.split(offset_K, codes), strict=True))
    found = torch.empty(len(z_ND), dtype=torch.int64, device=z_ND.device)
    for z_nD, found_n in zip(torch.split(z_ND, rows), torch.split(found, rows), strict=True):
        least_n = z_nD.new_full((len(z_nD),), torch.inf)
        found_n.zero_()
        for number, (codes_kD, offset_k) in enumerate(blocks):
            score_nk = torch.addmm(offset_k, z_nD, codes_kD.t(), alpha=-2)
            score_n, index_n = score_nk.min(1)
            # Strictly less: of equals in different blocks the first stays.
            better_n = score_n < least_n
            least_n = torch.where(better_n, score_n, least_n)
            found_n.copy_(torch.where(better_n, index_n + number * codes, found_n))
    return found
