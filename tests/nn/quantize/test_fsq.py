"""Rounding to levels: against the formula value by value, every code reached, and back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cantata.core.errors import ConfigError
from cantata.nn.quantize import FiniteScalarQuantizer
from tests.nn.quantize.small import close, filled, gradients, rows


@settings(max_examples=30)
@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_equals_its_formula(levels: list[int], seed: int) -> None:
    quantizer = filled(FiniteScalarQuantizer(levels))
    z_ND, weight_ND = rows(6, seed, len(levels)), rows(6, seed + 1, len(levels)).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)
    assert made.loss_sum == 0
    for n, row in enumerate(z_ND.tolist()):
        index, place = 0, 1
        for d, (z, L) in enumerate(zip(row, levels, strict=True)):
            half, offset = 1.001 * (L - 1) / 2, 0.5 * (L % 2 == 0)
            bent = math.tanh(z + math.atanh(offset / half))
            level = round(half * bent - offset)
            index, place = index + place * (level + L // 2), place * L
            assert made.values_ND[n, d].item() == pytest.approx(level / (L // 2), rel=1e-6)
            slope = half * (1 - bent**2) / (L // 2)
            # Bound: 1 - tanh^2 takes numbers near 1, rounded by some 1e-7, from each other, times 4 or less.
            wanted = slope * weight_ND[n, d].item()
            assert found["z"][n, d].item() == pytest.approx(wanted, rel=1e-6, abs=5e-6)
        assert made.indices_N[n].item() == index


def test_every_code_is_reached_and_zero_is_a_level() -> None:
    levels = [4, 3, 2]
    quantizer = filled(FiniteScalarQuantizer(levels))
    ends = torch.linspace(-4, 4, 41)
    made = quantizer(torch.tensor(list(itertools.product(ends.tolist(), repeat=3))))
    assert quantizer.num_codes == 24
    assert (made.usage_K > 0).all()
    assert quantizer(torch.zeros(1, 3)).values_ND.tolist() == [[0.0, 0.0, 0.0]]
    every = torch.arange(24)
    close(quantizer.decode(every).unique(dim=0).shape, torch.Size([24, 3]))
    assert quantizer.decode(every)[1].tolist() == [-0.5, -1, -1], "the first value's digit is the lowest"


@pytest.mark.parametrize("levels", [[], [8, 1]])
def test_bad_levels_are_one_line(levels: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantizer\.levels=\[.*\] must be one number"):
        FiniteScalarQuantizer(levels)
