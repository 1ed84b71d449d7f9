"""Emu3's tokenizer beside parity: units, counts, batch norms, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cantata.core.errors import ConfigError
from cantata.models.emu3.vqvae import Emu3VQVAE
from cantata.models.protocol import ImageTokenizer
from cantata.nn.batch_norm import BatchNorm
from cantata.nn.quantize import VectorQuantizer
from tests.models.autoencoder.small import filled, kernel_sums, pixels
from tests.models.emu3.vqvae.small import small_shape, small_vqvae

SHAPE = small_shape()


def test_an_image_is_the_first_frame_of_the_clip_that_repeats_it() -> None:
    """The short way for images against the long one; both in evaluation."""
    model = small_vqvae(SHAPE)
    image = pixels(2, 1, 3, 8, 8)
    clip = image.expand(-1, 4, -1, -1, -1)
    codes = model.encode(image)
    assert torch.equal(codes, model.encode(clip))
    torch.testing.assert_close(model.decode(codes), model.decode_clip(codes)[:, :1], atol=1e-5, rtol=1e-5)
    short, long = model(image), model(clip)
    torch.testing.assert_close(
        short.reconstruction_BTCHW, long.reconstruction_BTCHW[:, :1], atol=1e-5, rtol=1e-5
    )


def test_units_run_in_their_order_and_hold_every_parameter() -> None:
    model = small_vqvae(SHAPE)
    assert isinstance(model, ImageTokenizer)
    ran: list[str] = []
    for unit in model.units():
        assert model.get_submodule(unit.name) is unit.module
        unit.module.register_forward_pre_hook(lambda *_, name=unit.name: ran.append(name))
    model(pixels(1, 1, 3, 4, 4))
    assert ran == [unit.name for unit in model.units()]
    held = [id(p) for unit in model.units() for p in unit.module.parameters()]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [unit.name for unit in model.units() if unit.in_fp32] == ["quantizer"]


def test_no_block_holds_a_batch_norm() -> None:
    """Recomputation would move its running statistics twice."""
    for unit in small_vqvae(SHAPE).units():
        assert not (unit.is_block and any(isinstance(part, BatchNorm) for part in unit.module.modules()))


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_move_in_training_alone(training: bool) -> None:
    model = small_vqvae(SHAPE).train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(pixels(2, 4, 3, 8, 8))
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == (set(before) if training else set())


def test_operations_are_what_a_forward_of_an_image_counts() -> None:
    """The counter sees attention only where it runs as two products."""
    model = small_vqvae(SHAPE)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(pixels(2, 1, 3, 8, 12))
    search = 2 * 64 * 4
    counted = (counter.get_total_flops() - kernel_sums(model)) / 48 - search
    assert counted == pytest.approx(model.flops_per_token(24) / 3, rel=1e-6)


def test_initial_values() -> None:
    quantizer = VectorQuantizer(64, 4, 0.25, False, "straight_through")
    model = filled(Emu3VQVAE(SHAPE, quantizer), perturb=False)
    state = model.state_dict()
    assert torch.equal(state["temporal_encoder.blocks.0.norm1.running_var"], torch.ones(4))
    assert not state["temporal_encoder.blocks.0.norm1.running_mean"].any()
    assert torch.equal(state["decoder.head.norm.scale.bias"], torch.ones(32))
    assert not state["decoder.head.norm.shift.bias"].any()
    assert state["decoder.head.norm.scale.weight"].abs().max() > 0.4


@pytest.mark.parametrize(
    ("size", "message"),
    [((6, 8, 8), "a clip of 6 frames"), ((0, 8, 8), "a clip of 0 frames"), ((1, 7, 8), "multiples of 2")],
)
def test_sizes_that_it_cannot_take(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_vqvae(SHAPE).grid(*size)


def test_grids() -> None:
    model = small_vqvae(SHAPE)
    assert model.grid(1, 8, 6) == model.grid(4, 8, 6) == (1, 4, 3)
    assert model.grid(8, 8, 6) == (2, 4, 3)


def test_quantisers_that_are_not_emu3s() -> None:
    for settings, message in (((3, False), "dim is 3"), ((4, True), "l2_normalize")):
        dim, normalised = settings
        with pytest.raises(ConfigError, match=message):
            Emu3VQVAE(SHAPE, VectorQuantizer(64, dim, 0.25, normalised, "straight_through"))
