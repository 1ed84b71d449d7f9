"""Which token comes next: greedy, or drawn from what temperature, top-k and top-p leave.

B  sequences that go on together
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cantata.core.errors import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How a text goes on and where it ends."""

    max_new_tokens: int
    """Most tokens to add."""
    temperature: float
    """0 takes the likeliest token; above 0 draws from `softmax(logits / temperature)`."""
    top_k: int
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float
    """Draw among the fewest tokens whose probabilities reach p; 1: among all."""
    repetition_penalty: float
    """Divides positive and multiplies negative logits of tokens seen before, in the prompt too; 1: none."""
    stop: tuple[str, ...]
    """Texts that end a generation and are not part of it."""
    seed: int
    """Decides what is drawn, for each prompt by its place among all."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is none")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p choose what is drawn from; set temperature above 0")
        if "" in self.stop:
            raise ConfigError("a stop text is empty; it would end every generation at once")


def next_tokens(logits_BV: Tensor, seen_BV: Tensor | None, draws_B: Tensor, config: SamplingConfig) -> Tensor:
    """The token that each sequence goes on with, int64, (B,).

    Args:
        logits_BV: fp32; tokens that must not come are -inf.
        seen_BV: tokens that each sequence holds already; wanted where there is a repetition penalty.
        draws_B: a uniform number in [0, 1) for each sequence, fp64; read above temperature 0.
    """
    if seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, config.repetition_penalty)
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = scale(logits_BV, config.temperature)
    if config.top_k:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    return draw(logits_BV.softmax(-1), draws_B)


def scale(logits_BV: Tensor, temperature: float) -> Tensor:
    """The logits over the temperature, shifted so that each row's largest is 0: none overflows to inf."""
    tiny = torch.finfo(logits_BV.dtype).tiny
    # Beyond these the temperature or its reciprocal is 0 in this dtype, and of 0 or -inf it would make NaN.
    within = min(max(temperature, tiny), 1 / tiny)
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / within


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (Keskar et al., 2019, arXiv:1909.05858), for logits of either sign."""
    damped_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, damped_BV, logits_BV)


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` largest and what equals the least of them."""
    least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """-inf outside the nucleus (Holtzman et al., 2020, arXiv:1904.09751), with the token that reaches p."""
    sorted_BV, index_BV = logits_BV.sort(dim=-1)
    outside_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    outside_BV[:, -1] = False
    return logits_BV.masked_fill(outside_BV.scatter(-1, index_BV, outside_BV), -torch.inf)


def draw(probabilities_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The token in whose share of the line from 0 to 1 each draw falls; none of probability 0.

    The draws come from the host, so a seed draws the same numbers on every device and in every batch.
    """
    ends_BV = probabilities_BV.double().cumsum(-1)
    total_B = ends_BV[:, -1]
    at_B = torch.minimum(draws_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(ends_BV, at_B[:, None], right=True)[:, 0]
