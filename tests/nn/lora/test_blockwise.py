"""Blocks of elements in 4 or 8 bits against their definition, element by element."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from cantata.nn.lora.blockwise import BLOCK, Packing, matrices, pack, packed_bytes, sizes, unpack

pytest.importorskip("bitsandbytes")
KINDS = [Packing.int8, Packing.nf4]


def codes_of(packing: Packing) -> Tensor:
    """The values that codes stand for, from -1 to 1.

    NF4 are the quantiles of a normal distribution that the QLoRA paper's appendix E gives: eight evenly
    spaced ones above zero, seven below, and zero.
    """
    if packing is Packing.int8:
        return torch.arange(-127, 128) / 127
    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    upper = [quantile(float(p)) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]]
    lower = [-quantile(float(p)) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]]
    values = torch.tensor(sorted([*upper, 0.0, *lower]), dtype=torch.float64)
    return (values / values.max()).float()


def flat(blocks: int, packing: Packing, seed: int = 0) -> Tensor:
    return torch.randn(blocks * BLOCK[packing], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packing", KINDS)
def test_every_element_becomes_the_nearest_code_of_its_block(packing: Packing) -> None:
    given = flat(3, packing)
    given[: BLOCK[packing]] *= 100.0
    codes, scales = pack(given, packing)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    found = unpack(codes, scales, torch.float32, packing)
    for number, block in enumerate(given.view(3, -1)):
        largest = block.abs().max()
        assert scales[number] == largest
        values = codes_of(packing) * largest
        nearest = (block[:, None] - values).abs().min(1).values
        error = (found.view(3, -1)[number] - block).abs()
        torch.testing.assert_close(error, nearest, rtol=0, atol=2e-6 * float(largest))


@pytest.mark.parametrize("packing", KINDS)
def test_zero_and_the_largest_stay(packing: Packing) -> None:
    given = torch.zeros(2 * BLOCK[packing])
    given[3] = -0.7
    found = unpack(*pack(given, packing), torch.float32, packing)
    torch.testing.assert_close(found, given, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", KINDS)
def test_half_precision_is_fp32_rounded_once(packing: Packing) -> None:
    codes, scales = pack(flat(2, packing), packing)
    whole = unpack(codes, scales, torch.float32, packing)
    assert torch.equal(unpack(codes, scales, torch.bfloat16, packing), whole.bfloat16())


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("shape", [(64,), (6, 5), (16, 64), (3, 10, 7), (0, 4, 4), (2, 3, 10, 7)])
def test_sizes_are_those_of_what_is_packed(shape: tuple[int, ...], packing: Packing) -> None:
    """Of each matrix by itself, so that an expert's block holds nothing of another's."""
    count, elements = matrices(shape)
    assert count * elements == torch.Size(shape).numel()
    _, of_codes, blocks = sizes(shape, packing)
    assert (blocks - 1) * BLOCK[packing] < elements <= blocks * BLOCK[packing]
    codes, scales = pack(flat(blocks, packing), packing)
    assert (codes.numel(), scales.numel()) == (of_codes, blocks)
    assert packed_bytes(shape, packing) == count * (codes.nbytes + scales.nbytes)
