"""The search in blocks against a loop over all codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cantata.nn.quantize import nearest
from cantata.nn.quantize.nearest import nearest_codes
from tests.nn.quantize.small import LargestTensor, rows


@settings(max_examples=40)
@given(
    number=st.integers(1, 9),
    codes=st.integers(1, 13),
    dim=st.integers(1, 4),
    block=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_equals_a_loop_and_takes_the_first_of_equals(
    number: int, codes: int, dim: int, block: tuple[int, int], seed: int
) -> None:
    """On small whole numbers fp32 is exact, and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    z_ND = torch.randint(-2, 3, (number, dim), generator=generator).float()
    codes_KD = torch.randint(-2, 3, (codes, dim), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_CPU_BLOCK", block)
        found = nearest_codes(z_ND, codes_KD)
    for row, index in zip(z_ND.tolist(), found.tolist(), strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(row, e, strict=True)) for e in codes_KD.tolist()]
        assert index == distances.index(min(distances))


@pytest.mark.parametrize("dim", [4, 64])
def test_is_nearest_among_codes_that_fp32_tells_apart(dim: int) -> None:
    z_ND, codes_KD = rows(600, seed=1, dim=dim).detach(), rows(2500, seed=2, dim=dim).detach()
    distance_NK = torch.cdist(z_ND.double(), codes_KD.double()).square()
    found = nearest_codes(z_ND, codes_KD)
    chosen_N = distance_NK.gather(1, found[:, None])[:, 0]
    reach_N = (z_ND.norm(dim=1) + codes_KD.norm(dim=1).max()).double().square()
    assert (chosen_N - distance_NK.amin(1) <= 1e-6 * reach_N).all()
    assert (found == distance_NK.argmin(1)).float().mean() > 0.999


def test_never_holds_all_distances() -> None:
    z_ND, codes_KD = torch.randn(2000, 4), torch.randn(4000, 4)
    with LargestTensor() as largest:
        nearest_codes(z_ND, codes_KD)
    assert largest.elements <= 256 * 1024
