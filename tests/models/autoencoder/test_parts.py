"""What tokenizers share: units of pyramids, initial values by name, grids of codes."""

from __future__ import annotations

from functools import partial
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.models.autoencoder.parts import code_grid, fill, pyramid_units
from cantata.nn.resnet import Decoder, Encoder, GroupNorm, PyramidShape

SHAPE = PyramidShape(4, (1, 2), 1, ())


def filled(name: str, *shape: int) -> Tensor:
    tensor = torch.full(shape, 7.0)
    fill(nn.Module(), name, tensor, torch.Generator().manual_seed(0))
    return tensor


@pytest.mark.parametrize("middle", [True, False])
def test_units_of_an_encoder_run_in_their_order(middle: bool) -> None:
    pyramid = Encoder(SHAPE._replace(middle=middle), 3, 5)
    ran: list[str] = []
    for unit in pyramid_units("encoder", pyramid):
        unit.module.register_forward_pre_hook(lambda *_, name=unit.name: ran.append(name))
    pyramid(torch.zeros(1, 3, 4, 4))
    between = ["encoder.middle"] if middle else []
    assert ran == ["encoder.conv_in", "encoder.stages.0", "encoder.stages.1", *between, "encoder.head"]
    assert ran == [unit.name for unit in pyramid_units("encoder", pyramid)]


@pytest.mark.parametrize(("middle", "patch_size"), [(True, 1), (False, 2)])
def test_units_of_a_decoder_run_in_their_order(middle: bool, patch_size: int) -> None:
    pyramid = Decoder(SHAPE._replace(middle=middle), 5, 3, GroupNorm, patch_size)
    ran: list[str] = []
    for unit in pyramid_units("decoder", pyramid):
        unit.module.register_forward_pre_hook(lambda *_, name=unit.name: ran.append(name))
    pyramid(torch.zeros(1, 5, 2, 2), None)
    assert ran == [unit.name for unit in pyramid_units("decoder", pyramid)]
    assert ("decoder.middle" in ran, "decoder.unfold" in ran) == (middle, patch_size > 1)
    blocks = [unit.name for unit in pyramid_units("decoder", pyramid) if unit.is_block]
    assert blocks == [name for name in ran if "stages" in name or "middle" in name]


def test_norms_begin_as_identity_and_running_statistics_too() -> None:
    assert torch.equal(filled("encoder.head.norm.weight", 3), torch.ones(3))
    assert torch.equal(filled("temporal.norm1.running_var", 3), torch.ones(3))
    for leaf in ("bias", "running_mean", "num_batches_tracked"):
        assert not filled(f"temporal.norm1.{leaf}", 3).any()


def test_scale_and_shift_of_a_norm_begin_at_one_and_zero_with_weights_of_their_own() -> None:
    assert torch.equal(filled("decoder.head.norm.scale.bias", 3), torch.ones(3))
    assert not filled("decoder.head.norm.shift.bias", 3).any()
    for part in ("scale", "shift"):
        assert filled(f"decoder.head.norm.{part}.weight", 3, 4).abs().min() > 0


def test_residual_blocks_begin_as_what_they_are_added_to() -> None:
    assert not filled("encoder.stages.0.blocks.0.conv2.weight", 3, 4, 3, 3).any()
    assert not filled("encoder.stages.0.blocks.0.conv1.bias", 3).any()


def test_a_layer_keeps_the_variance_of_what_it_reads() -> None:
    """Uniform up to sqrt(3 / fan-in), of linear layers and convolutions of two and three dimensions."""
    for shape in ((64, 12), (64, 3, 3, 3), (64, 2, 3, 3, 3)):
        weight = filled("encoder.conv_in.weight", *shape)
        bound = sqrt(3 / weight[0].numel())
        assert 0.97 * bound < float(weight.abs().max()) <= bound
        assert abs(float(weight.var()) * weight[0].numel() - 1) < 0.15


def test_grids_of_codes() -> None:
    grid = partial(code_grid, 4)
    assert grid(16, 24) == (4, 6)
    for height, width in ((16, 25), (17, 24), (0, 24), (16, 0)):
        message = f"images of {width} x {height} pixels: both sides must be multiples of 4"
        with pytest.raises(ConfigError, match=message):
            grid(height, width)
