"""Scaling, and how often dropout keeps an input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cantata.nn.lora.settings import draw_kept
from tests.nn.lora.factors import DROPPED, PLAIN, RSLORA


def test_scaling() -> None:
    assert PLAIN.scaling == 2.0
    assert RSLORA.scaling == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_the_share_that_is_dropped(dropout: float) -> None:
    torch.manual_seed(0)
    kept = draw_kept((300, 1001), torch.device("cpu"), dropout)
    assert kept.shape == (300, 1001)
    assert kept.dtype == torch.bool
    # Within four standard deviations, on the whole and in each of the rows and columns taken together.
    share = (dropout * (1 - dropout)) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - dropout)) < 4 * share / kept.numel() ** 0.5
    for dim, size in ((0, 300), (1, 1001)):
        spread = float(kept.float().mean(dim).std())
        assert spread == pytest.approx(share / size**0.5, rel=0.2)


def test_the_default_generator_decides() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(draw_kept((7, 9), torch.device("cpu"), 0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_nothing_is_drawn_outside_training_or_without_dropout() -> None:
    device = torch.device("cpu")
    before = torch.get_rng_state()
    assert DROPPED.draw_kept((3,), device, training=False) is None
    assert replace(DROPPED, dropout=0.0).draw_kept((3,), device, training=True) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert DROPPED.draw_kept((3,), device, training=True) is not None
