"""Rotary positions against complex numbers."""

from __future__ import annotations

import torch

from cantata.nn.rope import rotary_tables, rotate


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
