"""Rotary positions against complex numbers."""

from __future__ import annotations

import math

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.nn.rope import Llama3Scaling, rotary_tables, rotate


def test_equals_a_complex_rotation() -> None:
    positions = torch.tensor([0, 1, 2, 0, 7, 4000])
    x = torch.randn(6, 3, 8, dtype=torch.float64)
    out = rotate(x, rotary_tables(positions, 8, 1e4, torch.float64))
    for t, position in enumerate(positions.tolist()):
        for pair in range(4):
            angle = torch.tensor(position * 1e4 ** (-2 * pair / 8), dtype=torch.float64)
            expected = torch.complex(x[t, :, pair], x[t, :, pair + 4]) * torch.polar(
                torch.ones_like(angle), angle
            )
            # The tables are fp32, and so is the largest angle: 4000 * 2^-24.
            torch.testing.assert_close(out[t, :, pair], expected.real, rtol=0, atol=2e-3 if t == 5 else 1e-6)
            torch.testing.assert_close(
                out[t, :, pair + 4], expected.imag, rtol=0, atol=2e-3 if t == 5 else 1e-6
            )


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16)
    scores = [
        (
            rotate(q, rotary_tables(torch.tensor([a]), 16, 1e4, torch.float32))
            * rotate(k, rotary_tables(torch.tensor([b]), 16, 1e4, torch.float32))
        ).sum()
        for a, b in ((5, 2), (13, 10))
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_llama3_scaling_slows_long_waves_and_mixes_those_in_between() -> None:
    """Frequency by frequency, as the wave's length decides."""
    scaling, dim, theta = Llama3Scaling(8.0, 1.0, 4.0, 64), 16, 1e4
    table = rotary_tables(torch.tensor([1]), dim, theta, torch.float32, scaling).cos_T1h[0, 0, : dim // 2]
    kinds = set()
    for i, found in enumerate(table.tolist()):
        frequency = theta ** (-2 * i / dim)
        length = 2 * math.pi / frequency
        if length < 64 / 4:
            kinds.add("kept")
        elif length > 64 / 1:
            kinds.add("slowed")
            frequency /= 8
        else:
            kinds.add("mixed")
            share = (64 / length - 1) / (4 - 1)
            frequency = (1 - share) * frequency / 8 + share * frequency
        assert found == pytest.approx(math.cos(frequency), abs=1e-6)
    assert kinds == {"kept", "mixed", "slowed"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 1.0, 4.0, 64), "factor"),
        ((8.0, 1.0, 4.0, 0), "original_max_position_embeddings"),
        ((8.0, 4.0, 4.0, 64), "low_freq_factor"),
        ((8.0, 0.0, 4.0, 64), "low_freq_factor"),
    ],
)
def test_scaling_that_makes_no_sense(values: tuple[float, float, float, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama3Scaling(*values)
