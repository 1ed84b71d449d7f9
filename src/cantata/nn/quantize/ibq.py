"""A gradient for every code: the choice of a code is a softmax over all of them, made hard.

N  rows    D  width of a row    K  codes    R  rows of a chunk
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.common import (
    check_positive,
    check_size,
    check_weight,
    entropy_of_mean,
    fp32,
    squared_error,
)

_CPU_CHUNK, _CHUNK = 2**20, 2**26
"""Logits that exist at a time on the CPU, whose cache holds about as many, and elsewhere."""


class IndexBackpropagationQuantizer(Quantizer):
    """Codes by the largest product, with gradients through all products (Shi et al. 2024, arXiv:2412.02692).

    With `p = softmax(z E^T)` the choice is `hard + p - sg[p]`: the value of a row is the code e of its
    largest product, and the gradient of the value reaches rows and all codes through p. A row loses::

        mean((q - z)^2) + mean((sg[e] - z)^2) + commitment * mean((e - sg[z])^2)
        + row_entropy * H(p_n) - batch_entropy * H(mean_n(p_n))

    q being the value with that gradient, e the code alone, the means over D. The first two are the parts
    `soft` and `hard`, equal in value, the third is `codebook`. Entropies are in nats, of the softmax at
    `entropy_temperature`; the mean in the last is over the micro-batch's rows on all ranks.

    N x K numbers exist only for a few rows at a time: backward makes the products again.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float,
        row_entropy: float,
        batch_entropy: float,
        entropy_temperature: float,
    ) -> None:
        """Raises `ConfigError` for sizes, weights or a temperature that cannot be."""
        super().__init__()
        check_size("num_codes", num_codes, 2)
        check_size("dim", dim, 1)
        check_weight("commitment", commitment)
        check_weight("row_entropy", row_entropy)
        check_weight("batch_entropy", batch_entropy)
        check_positive("entropy_temperature", entropy_temperature)
        self.num_codes = num_codes
        self.dim = dim
        self.commitment = commitment
        self.row_entropy = row_entropy
        self.batch_entropy = batch_entropy
        self.entropy_temperature = entropy_temperature
        self.codebook_KD = nn.Parameter(torch.empty(num_codes, dim))

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            rows_ND, codes_KD = z_ND.float(), self.codebook_KD.float()
            values_ND, row_entropy, mass_K, indices_N = _Choice.apply(  # type: ignore[no-untyped-call]
                rows_ND, codes_KD, self.entropy_temperature
            )
            codes_ND = F.embedding(indices_N, codes_KD)
            terms = {
                "soft": squared_error(values_ND, rows_ND),
                "hard": squared_error(codes_ND.detach(), rows_ND),
                "codebook": squared_error(codes_ND, rows_ND.detach()),
                "row_entropy": row_entropy,
                "batch_entropy": entropy_of_mean(
                    mass_K, len(z_ND), self.training and torch.is_grad_enabled()
                ),
            }
            loss_sum = (
                terms["soft"]
                + terms["hard"]
                + self.commitment * terms["codebook"]
                + self.row_entropy * terms["row_entropy"]
                - self.batch_entropy * terms["batch_entropy"]
            )
        return Quantized(
            values_ND.to(z_ND.dtype),
            indices_N,
            loss_sum,
            {name: term.detach() for name, term in terms.items()},
            usage(indices_N, self.num_codes),
            {},
        )

    def decode(self, indices_N: Tensor) -> Tensor:
        return F.embedding(indices_N, self.codebook_KD.float())

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Codes normal with a variance of 1: products of small ones would all be alike, and p with them."""
        if name != "codebook_KD":
            raise KeyError(name)
        tensor.normal_(generator=generator)


class _Choice(torch.autograd.Function):
    """Values, summed entropy of rows, summed distributions and indices; the last without gradient."""

    @staticmethod
    def forward(
        ctx: Any, z_ND: Tensor, codes_KD: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        entropy, mass_K = z_ND.new_zeros(()), z_ND.new_zeros(len(codes_KD))
        indices = []
        for z_RD in torch.split(z_ND, _chunk_rows(codes_KD)):
            logits_RK = z_RD @ codes_KD.t()
            indices.append(logits_RK.argmax(1))
            soft = _Softmax.of(logits_RK, temperature)
            entropy += soft.entropy_R1.sum()
            mass_K += soft.p_RK.sum(0)
        indices_N = torch.cat(indices)
        ctx.save_for_backward(z_ND, codes_KD, indices_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(indices_N)
        return F.embedding(indices_N, codes_KD), entropy, mass_K, indices_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_ND: Tensor, grad_entropy: Tensor, grad_mass_K: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        z_ND, codes_KD, indices_N = ctx.saved_tensors
        grad_z_ND = torch.empty_like(z_ND)
        # The hard choice is the factor of the codes in the value, the soft one carries its gradient.
        # Unlike index_add, an embedding's backward is the same in every run.
        grad_codes_KD = torch.ops.aten.embedding_dense_backward(grad_ND, indices_N, len(codes_KD), -1, False)
        rows = _chunk_rows(codes_KD)
        for z_RD, grad_RD, out_RD in zip(
            *(torch.split(tensor, rows) for tensor in (z_ND, grad_ND, grad_z_ND)), strict=True
        ):
            logits_RK = z_RD @ codes_KD.t()
            soft = _Softmax.of(logits_RK, ctx.temperature)
            spread_RK = grad_mass_K - grad_entropy * soft.log_p_RK
            grad_logits_RK = _through_softmax(soft.p_RK, spread_RK).div_(ctx.temperature)
            grad_logits_RK += _through_softmax(logits_RK.softmax(1), grad_RD @ codes_KD.t())
            torch.mm(grad_logits_RK, codes_KD, out=out_RD)
            grad_codes_KD.addmm_(grad_logits_RK.t(), z_RD)
        return grad_z_ND, grad_codes_KD, None


class _Softmax(NamedTuple):
    """Probabilities of a chunk's rows."""

    p_RK: Tensor
    log_p_RK: Tensor
    entropy_R1: Tensor

    @staticmethod
    def of(logits_RK: Tensor, temperature: float) -> _Softmax:
        log_p_RK = (logits_RK / temperature).log_softmax(1)
        p_RK = log_p_RK.exp()
        return _Softmax(p_RK, log_p_RK, -(p_RK * log_p_RK).sum(1, keepdim=True))


def _through_softmax(p_RK: Tensor, grad_RK: Tensor) -> Tensor:
    """The gradient of logits from that of their softmax; a constant added to a row's gradient is nothing."""
    weighted_RK = p_RK * grad_RK
    return weighted_RK.addcmul_(p_RK, weighted_RK.sum(1, keepdim=True), value=-1)


def _chunk_rows(codes_KD: Tensor) -> int:
    return max(1, (_CPU_CHUNK if codes_KD.device.type == "cpu" else _CHUNK) // len(codes_KD))
