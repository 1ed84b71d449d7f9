"""What quantisers share: how gradients pass, what a row loses, and means over all ranks that stay exact.

N  rows    D  width of a row    K  codes
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cantata.core.dist import all_reduce_sum
from cantata.core.errors import ConfigError

_SMALLEST = torch.finfo(torch.float32).tiny
"""Keeps the logarithm of a probability that underflowed finite; times that probability it is 0."""


def fp32(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast leaves everything as it is."""
    # Plans run without values, on a device that has no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def straight_through(z_ND: Tensor, values_ND: Tensor) -> Tensor:
    """`values`, bit for bit, with the gradient of `z` (Bengio et al. 2013, arXiv:1308.3432)."""
    return values_ND.detach() + (z_ND - z_ND.detach())


def rotated(z_ND: Tensor, values_ND: Tensor) -> Tensor:
    """`values`, bit for bit, with the gradient of `z` turned and scaled onto them.

    The rotation takes the direction of a row to that of its code in the plane of the two, and the gradient
    takes the same way back (Fifty et al. 2024, arXiv:2410.06424, 4.2). It is a constant.
    """
    with torch.no_grad():
        from_ND, onto_ND = unit(z_ND), unit(values_ND)
        between_ND = unit(from_ND + onto_ND)
        scale_N1 = values_ND.norm(dim=-1, keepdim=True) / z_ND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    mirrored_ND = z_ND - 2 * (z_ND * between_ND).sum(-1, keepdim=True) * between_ND
    turned_ND = mirrored_ND + 2 * (z_ND * from_ND).sum(-1, keepdim=True) * onto_ND
    return straight_through(scale_N1 * turned_ND, values_ND)


def unit(rows_ND: Tensor) -> Tensor:
    """Rows of length 1; those shorter than 1e-6, whose gradient would burst, stay shorter."""
    return torch.nn.functional.normalize(rows_ND, dim=-1, eps=1e-6)


def squared_error(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The sum over rows of a row's mean squared difference, the mean being over D."""
    return (a_ND - b_ND).square().sum() / a_ND.shape[-1]


def entropy_of_mean(mass: Tensor, rows: int, over_ranks: bool) -> Tensor:
    """This rank's share of N times the entropy of the mean distribution, in nats.

    Of `p = sum_n(p_n) / N` over the rows of all ranks, each rank gives `-sum_k(log(p_k) m_k)` with its own
    mass `m` and the logarithm held constant. Shares add up to `N * H(p)`, and their gradients to its: what is
    left out, `sum_k(p_k / p_k * dm_k)`, is 0 because every row's distribution sums to 1.

    Args:
        mass: sum over this rank's rows of their distributions, in any shape; several distributions (of
            groups) may lie side by side, and their entropies are added.
        rows: of this rank.
        over_ranks: whether the mean is over the rows of all ranks, which must then all be here.
    """
    total = torch.cat([mass.detach().flatten(), mass.new_full((1,), rows)])
    if over_ranks:
        total = all_reduce_sum(total)
    mean = (total[:-1] / total[-1]).clamp_min(_SMALLEST).view_as(mass)
    return -(mean.log() * mass).sum()


def check_size(name: str, value: int, least: int) -> None:
    """Raise `ConfigError` for a size below `least`."""
    if value < least:
        raise bad(name, value, f"at least {least}")


def check_weight(name: str, value: float) -> None:
    """Raise `ConfigError` for a coefficient below 0 or without a value."""
    if not 0 <= value < math.inf:
        raise bad(name, value, "a number, at least 0")


def check_positive(name: str, value: float) -> None:
    """Raise `ConfigError` for a number that is not above 0."""
    if not 0 < value < math.inf:
        raise bad(name, value, "a number above 0")


def check_share(name: str, value: float) -> None:
    """Raise `ConfigError` for a share outside 0 to below 1."""
    if not 0 <= value < 1:
        raise bad(name, value, "at least 0 and below 1")


def bad(name: str, value: object, wanted: str) -> ConfigError:
    """The error for a constructor argument of a quantiser."""
    return ConfigError(f"model.quantizer.{name}={value} must be {wanted}")
