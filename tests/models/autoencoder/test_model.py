"""The autoencoder: shapes, codes, counts, initial values, and what its parts refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cantata.core.errors import ConfigError
from cantata.models.autoencoder import Autoencoder, AutoencoderConfig
from cantata.models.protocol import ImageTokenizer
from cantata.nn.quantize import ResidualQuantizer
from tests.models.autoencoder.small import (
    COMPACT,
    SHAPE,
    Nearest,
    filled,
    kernel_sums,
    pixels,
    small_autoencoder,
)


def test_it_is_an_image_tokenizer_of_the_shape_it_says() -> None:
    model = small_autoencoder()
    assert isinstance(model, ImageTokenizer)
    output = model(pixels(2, 1, 3, 16, 24))
    assert output.reconstruction_BTCHW.shape == (2, 1, 3, 16, 24)
    assert output.quantized.indices_N.shape == (2 * 4 * 6,)
    assert model.grid(1, 16, 24) == (1, 4, 6)
    assert len(model.moe_layers()) == 0
    assert model.balance is None


def test_decoding_the_codes_gives_the_reconstruction() -> None:
    """Within the rounding of the straight-through sum of this quantiser."""
    model, images = small_autoencoder(), pixels(2, 1, 3, 16, 24)
    output, codes = model(images), model.encode(images)
    assert codes.shape == (2, 1, 4, 6)
    assert len(codes.unique()) > 3
    torch.testing.assert_close(model.decode(codes), output.reconstruction_BTCHW, atol=1e-5, rtol=1e-5)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    model, images = small_autoencoder(), pixels(3, 1, 3, 16, 16)
    alone = torch.cat([model(image[None]).reconstruction_BTCHW for image in images])
    torch.testing.assert_close(model(images).reconstruction_BTCHW, alone, atol=1e-5, rtol=1e-5)


def test_several_codes_a_position() -> None:
    quantizer = ResidualQuantizer(16, 4, 3, 0.25, False)
    model = filled(Autoencoder(SHAPE, quantizer))
    assert isinstance(model, Autoencoder)
    codes = model.encode(pixels(2, 1, 3, 8, 12))
    assert codes.shape == (2, 1, 2, 3, 3)
    assert model.decode(codes).shape == (2, 1, 3, 8, 12)


def test_the_last_layer_reads_the_last_input() -> None:
    model = small_autoencoder()
    output = model(pixels(2, 1, 3, 8, 8))
    again = model.last_layer(output.last_input)
    assert torch.equal(again, output.reconstruction_BTCHW[:, 0])


def test_every_parameter_learns() -> None:
    model, images = small_autoencoder(), pixels(2, 1, 3, 16, 16)
    output = model(images)
    (output.reconstruction_BTCHW.sub(images).square().mean() + output.quantized.loss_sum).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A softmax does not see what is added to all its logits.
    assert all(name.endswith("k_proj.bias") for name in dead)


@pytest.mark.parametrize("shape", [SHAPE, COMPACT], ids=["published", "compact"])
def test_units_run_in_their_order_and_hold_every_parameter(shape: AutoencoderConfig) -> None:
    model = small_autoencoder(shape=shape)
    ran: list[str] = []
    for unit in model.units():
        assert model.get_submodule(unit.name) is unit.module
        unit.module.register_forward_pre_hook(lambda *_, name=unit.name: ran.append(name))
    model(pixels(1, 1, 3, 8, 8))
    assert ran == [unit.name for unit in model.units()]
    held = [id(p) for unit in model.units() for p in unit.module.parameters()]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [unit.name for unit in model.units() if unit.in_fp32] == ["quantizer"]


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, attention_levels=(0, 1)), COMPACT])
def test_operations_are_what_a_forward_counts(shape: AutoencoderConfig) -> None:
    """The counter sees attention only where it runs as two products."""
    model = small_autoencoder(shape=shape)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(pixels(2, 1, 3, 16, 24))
    counted = counter.get_total_flops() - kernel_sums(model)
    assert counted / (2 * 24) == model.flops_per_token(24) / 3


def test_initial_values() -> None:
    model = filled(Autoencoder(SHAPE, Nearest(32, 4)), perturb=False)
    assert torch.equal(model.get_parameter("encoder.head.norm.weight"), torch.ones(16))
    assert not model.get_parameter("decoder.middle.attention.norm.bias").any()
    weight = model.get_parameter("encoder.stages.1.blocks.0.conv1.weight")
    bound = (3 / weight[0].numel()) ** 0.5
    assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
    assert not model.get_parameter("encoder.stages.1.blocks.0.conv1.bias").any()
    assert not model.get_parameter("encoder.stages.1.blocks.0.conv2.weight").any()


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [(4, 8, 8, "a clip of 4 frames"), (1, 8, 10, "10 x 8 pixels: both sides must be multiples of 4")],
)
def test_sizes_that_it_cannot_take(frames: int, height: int, width: int, message: str) -> None:
    model = small_autoencoder()
    with pytest.raises(ConfigError, match=message):
        model.grid(frames, height, width)
    with pytest.raises(ConfigError, match=message):
        model.encode(torch.zeros(1, frames, 3, height, width))


def test_bf16_gives_bf16_with_codes_in_fp32() -> None:
    model = small_autoencoder().bfloat16()
    model.quantizer.float()
    output = model(pixels(1, 1, 3, 8, 8))
    assert output.reconstruction_BTCHW.dtype is torch.bfloat16
    assert output.quantized.loss_sum.dtype is torch.float32
    assert model.decode(model.encode(pixels(1, 1, 3, 8, 8))).dtype is torch.bfloat16
