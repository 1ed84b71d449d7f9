"""Operations by formula against torch's counter of those that run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cantata.nn.conv import Upsample
from cantata.nn.conv_operations import decoder_operations, encoder_operations, products
from cantata.nn.resnet import Decoder, Encoder, GroupNorm, PyramidShape, SpatialNorm

SHAPES = {
    "published": PyramidShape(4, (1, 2, 3), 1, (2,)),
    "attention at a fine level": PyramidShape(4, (1, 2), 2, (0,)),
    "compact": PyramidShape(4, (1, 2), 1, (), middle=False, direct=True),
    "one level": PyramidShape(4, (2,), 1, ()),
}
ROWS, COLUMNS, IMAGES = 2, 3, 2
CODES = ROWS * COLUMNS


def counted(module: nn.Module, *given: Tensor | None) -> float:
    """Of a forward, for a position of the coarsest level; attention is seen where it runs as two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*given)
    # Kernels of 16 taps are made of those of 9 once a forward, whatever the images.
    kernels = sum(
        2 * 16 * part.conv.weight.numel() for part in module.modules() if isinstance(part, Upsample)
    )
    return float(counter.get_total_flops() - kernels) / (IMAGES * CODES)


@pytest.mark.parametrize("kind", SHAPES)
def test_an_encoder(kind: str) -> None:
    shape = SHAPES[kind]
    side = 1 << (len(shape.multipliers) - 1)
    encoder = Encoder(shape, 3, 5)
    found = counted(encoder, torch.zeros(IMAGES, 3, ROWS * side, COLUMNS * side))
    assert encoder_operations(encoder, CODES) == found


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_decoder(kind: str, patch_size: int) -> None:
    decoder = Decoder(SHAPES[kind], 5, 3, GroupNorm, patch_size)
    found = counted(decoder, torch.zeros(IMAGES, 5, ROWS, COLUMNS), None)
    assert decoder_operations(decoder, CODES) == found


def test_norms_read_their_condition_at_the_coarsest_level() -> None:
    shape = PyramidShape(32, (1, 2), 1, (1,))
    decoder = Decoder(shape, 5, 3, partial(SpatialNorm, condition_dim=5), 1)
    given = torch.zeros(IMAGES, 5, ROWS, COLUMNS)
    assert decoder_operations(decoder, CODES) == counted(decoder, given, given)


def test_more_codes_cost_more_where_they_attend() -> None:
    quiet, loud = (Encoder(SHAPES[kind], 3, 5) for kind in ("compact", "published"))
    assert encoder_operations(quiet, 64) == encoder_operations(quiet, 16)
    # Two products of 12 channels over 48 codes more, in one level and in the middle.
    assert encoder_operations(loud, 64) - encoder_operations(loud, 16) == 2 * 4 * 48 * 12


def test_products_leave_biases_out() -> None:
    assert products(nn.Linear(3, 5), 7.0) == 2 * 7 * 15
