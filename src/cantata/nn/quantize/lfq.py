"""No codebook to look up: the signs of a row are the bits of its code.

N  rows    D  width of a row, one for each bit    K  codes: 2^D
G  groups of bits    g  bits of a group
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cantata.nn.quantize.base import Quantized, Quantizer, usage
from cantata.nn.quantize.common import (
    bad,
    check_positive,
    check_size,
    check_weight,
    entropy_of_mean,
    fp32,
    squared_error,
    straight_through,
)


class LookupFreeQuantizer(Quantizer):
    """Values are +-1 by sign, 0 being negative (MAGVIT-2, arXiv:2310.05737; Open-MAGVIT2, arXiv:2409.04410).

    A row loses `commitment * mean((sg[e] - z)^2) + row_entropy * H(p_n) - batch_entropy * H(mean_n(p_n))`,
    the first mean being over D and entropies in nats. `p_n` is a softmax over all codes c of
    `-|z_n - c|^2 / entropy_temperature`; the mean of it is over the micro-batch's rows on all ranks.

    The softmax is never built. Squared distances are sums over bits, so its bits are independent, each 1 with
    the log-odds `4 z_d / entropy_temperature`, and the entropy of a row is the sum of theirs: exact.

    A mean of such distributions has dependent bits, and its entropy needs the probability of every code. That
    of a code is the product of one factor of its lower and one of its upper half of bits, so the sum over
    rows is a matrix product of two N x 2^(D/2) matrices: exact as well, and of 2^18 codes no more than 512
    numbers a row. `group_bits` below D treats groups of so many consecutive bits as independent in the mean
    as well, and adds their entropies, an upper bound of the exact value, of which only `D / g * 2^g`
    probabilities remain.
    """

    def __init__(
        self,
        num_codes: int,
        commitment: float,
        row_entropy: float,
        batch_entropy: float,
        entropy_temperature: float,
        group_bits: int,
    ) -> None:
        """Raises `ConfigError` for sizes, weights or a temperature that cannot be."""
        super().__init__()
        check_size("num_codes", num_codes, 2)
        if num_codes & (num_codes - 1):
            raise bad("num_codes", num_codes, "a power of 2: each value of a row is a bit of its code")
        check_weight("commitment", commitment)
        check_weight("row_entropy", row_entropy)
        check_weight("batch_entropy", batch_entropy)
        check_positive("entropy_temperature", entropy_temperature)
        self.num_codes = num_codes
        self.dim = num_codes.bit_length() - 1
        if group_bits < 1 or self.dim % group_bits:
            raise bad("group_bits", group_bits, f"a divisor of the {self.dim} bits of a code")
        self.commitment = commitment
        self.row_entropy = row_entropy
        self.batch_entropy = batch_entropy
        self.entropy_temperature = entropy_temperature
        self.group_bits = group_bits

    def forward(self, z_ND: Tensor) -> Quantized:
        with fp32(z_ND.device):
            rows_ND = z_ND.float()
            bits_ND = rows_ND.detach() > 0
            indices_N = (bits_ND.long() << self._places(z_ND.device)).sum(-1)
            codes_ND = _signs(bits_ND)
            odds_ND = rows_ND * (4 / self.entropy_temperature)
            terms = {
                "commitment": squared_error(codes_ND, rows_ND),
                "row_entropy": _entropy_of_bits(odds_ND),
                "batch_entropy": entropy_of_mean(
                    self._mass(odds_ND), len(z_ND), self.training and torch.is_grad_enabled()
                ),
            }
            loss_sum = (
                self.commitment * terms["commitment"]
                + self.row_entropy * terms["row_entropy"]
                - self.batch_entropy * terms["batch_entropy"]
            )
            values_ND = straight_through(rows_ND, codes_ND).to(z_ND.dtype)
        return Quantized(
            values_ND,
            indices_N,
            loss_sum,
            {name: term.detach() for name, term in terms.items()},
            usage(indices_N, self.num_codes),
            {},
        )

    def decode(self, indices_N: Tensor) -> Tensor:
        return _signs(indices_N[..., None] >> self._places(indices_N.device) & 1 == 1)

    def _places(self, device: torch.device) -> Tensor:
        return torch.arange(self.dim, device=device)

    def _mass(self, odds_ND: Tensor) -> Tensor:
        """Sum over rows of the joint distribution of each group's bits: (G, 2^(g/2), 2^(g - g/2))."""
        odds_NGg = odds_ND.view(len(odds_ND), -1, self.group_bits)
        half = self.group_bits // 2
        lower_GNl, upper_GNu = (
            _joint(part).transpose(0, 1) for part in (odds_NGg[..., :half], odds_NGg[..., half:])
        )
        return lower_GNl.transpose(1, 2) @ upper_GNu


def _signs(bits_ND: Tensor) -> Tensor:
    return bits_ND.float() * 2 - 1


def _entropy_of_bits(odds_ND: Tensor) -> Tensor:
    """The sum of the entropies of independent bits; by the size of the odds, so that nothing cancels."""
    size_ND = odds_ND.abs()
    return (F.softplus(-size_ND) + size_ND * (-size_ND).sigmoid()).sum()


def _joint(odds_NGb: Tensor) -> Tensor:
    """Probabilities of all 2^b values of b independent bits."""
    joint_NGv = odds_NGb.new_ones(*odds_NGb.shape[:-1], 1)
    for bit in range(odds_NGb.shape[-1]):
        odds_NG1 = odds_NGb[..., bit, None]
        joint_NGv = torch.cat([joint_NGv * (-odds_NG1).sigmoid(), joint_NGv * odds_NG1.sigmoid()], -1)
    return joint_NGv
