"""A codebook that follows the rows it is given, without gradients.

N  rows    D  width of a row    K  codes
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.candidates import CandidateRows
from cantata.nn.quantize.common import (
    check_positive,
    check_share,
    check_size,
    check_weight,
    fp32,
    squared_error,
    straight_through,
)
from cantata.nn.quantize.nearest import nearest_codes


class EMAVectorQuantizer(Quantizer):
    """The nearest code; codes are moving averages of their rows (arXiv:1711.00937 A.1, arXiv:1906.00446).

    A row loses `commitment * mean((sg[e] - z)^2)`, the mean being over D. `update` learns from a step of n_k
    rows of code k that sum to m_k, over all micro-batches and ranks::

        size_k = decay * size_k + (1 - decay) * n_k        sum_k = decay * sum_k + (1 - decay) * m_k
        e_k = sum_k / ((size_k + eps) / (sum(size) + K * eps) * sum(size))

    The first update instead makes K of the step's rows the codes, each with the mean size, and every later
    one does so with the codes whose size is below `reset_below` times the mean: codes that no row meets.
    Which rows is a matter of chance, but alike on every rank and for any number of them (`CandidateRows`). In
    a step of fewer rows the codes of the highest indices wait for the next one.

    Rows are drawn from what forward saw in training with gradients enabled, so each micro-batch must pass
    exactly once before `update`: leave this module out of recomputation.
    """

    codebook_KD: Tensor
    cluster_size_K: Tensor
    cluster_sum_KD: Tensor
    updates: Tensor

    def __init__(
        self, num_codes: int, dim: int, commitment: float, decay: float, eps: float, reset_below: float
    ) -> None:
        """Raises `ConfigError` for sizes, weights or shares that cannot be."""
        super().__init__()
        check_size("num_codes", num_codes, 2)
        check_size("dim", dim, 1)
        check_weight("commitment", commitment)
        check_share("decay", decay)
        check_positive("eps", eps)
        check_share("reset_below", reset_below)
        self.num_codes = num_codes
        self.dim = dim
        self.commitment = commitment
        self.decay = decay
        self.eps = eps
        self.reset_below = reset_below
        self.register_buffer("codebook_KD", torch.empty(num_codes, dim))
        self.register_buffer("cluster_size_K", torch.empty(num_codes))
        self.register_buffer("cluster_sum_KD", torch.empty(num_codes, dim))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64))
        self._candidates = CandidateRows(num_codes)

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            rows_ND = z_ND.float()
            indices_N = nearest_codes(rows_ND, self.codebook_KD)
            codes_ND = self.decode(indices_N)
            commitment = squared_error(codes_ND, rows_ND)
            values_ND = straight_through(rows_ND, codes_ND).to(z_ND.dtype)
        usage_K = usage(indices_N, self.num_codes)
        statistics = {}
        if self.training and torch.is_grad_enabled():
            statistics = self._observe(rows_ND.detach(), indices_N, usage_K)
        return Quantized(
            values_ND,
            indices_N,
            self.commitment * commitment,
            {"commitment": commitment.detach()},
            usage_K,
            statistics,
        )

    def decode(self, indices_N: Tensor) -> Tensor:
        return F.embedding(indices_N, self.codebook_KD.float())

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Codes normal, only to have some before the first update; no rows yet."""
        if name == "codebook_KD":
            tensor.normal_(generator=generator)
        elif name in ("cluster_size_K", "cluster_sum_KD", "updates"):
            tensor.zero_()
        else:
            raise KeyError(name)

    @torch.no_grad()
    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Learn from `ema/rows_K` and `ema/sum_KD`, summed over the step's micro-batches and ranks."""
        device = self.codebook_KD.device
        rows_K, new_KD = (statistics[name].to(device, torch.float64) for name in ("ema/rows_K", "ema/sum_KD"))
        size_K = torch.lerp(rows_K, self.cluster_size_K.double(), self.decay)
        sum_KD = torch.lerp(new_KD, self.cluster_sum_KD.double(), self.decay)
        mean = size_K.mean()
        drawn_KD, count = self._candidates.take(self.codebook_KD[0])
        dead_K = (size_K < self.reset_below * mean) | (self.updates == 0)
        place_K = dead_K.cumsum(0) - 1
        reset_K = dead_K & (place_K < count)
        fresh_KD = drawn_KD.double()[place_K.clamp_min(0)]
        size_K = torch.where(reset_K, mean, size_K)
        sum_KD = torch.where(reset_K[:, None], fresh_KD * mean, sum_KD)
        total = size_K.sum()
        smooth_K = (size_K + self.eps) / (total + self.num_codes * self.eps) * total
        mean_KD = torch.where(reset_K[:, None], fresh_KD, sum_KD / smooth_K[:, None])
        # A code that never had a row has no mean yet.
        self.codebook_KD.copy_(torch.where((size_K > 0)[:, None], mean_KD, self.codebook_KD))
        self.cluster_size_K.copy_(size_K)
        self.cluster_sum_KD.copy_(sum_KD)
        self.updates += 1

    def _observe(self, rows_ND: Tensor, indices_N: Tensor, usage_K: Tensor) -> dict[str, Tensor]:
        self._candidates.add(rows_ND, self.updates)
        sum_KD = torch.zeros(self.num_codes, self.dim, dtype=torch.float64, device=rows_ND.device)
        # Unlike index_add, the same in every run on a GPU.
        sum_KD.index_put_((indices_N,), rows_ND.double(), accumulate=True)
        return {"ema/rows_K": usage_K.double(), "ema/sum_KD": sum_KD}
