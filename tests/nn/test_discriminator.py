"""The patch discriminator: sizes, independence of the batch, gradients, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.nn.discriminator import PatchDiscriminator

SMALL: dict[str, Any] = {"dims": 2, "in_channels": 3, "base_channels": 4, "layers": 2, "norm_groups": 2}


def build(**changes: Any) -> PatchDiscriminator:
    model = PatchDiscriminator(**(SMALL | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            model.init_parameter(name, parameter, generator)
            if name.endswith("bias"):
                assert not parameter.any()
    return model


@pytest.mark.parametrize(("dims", "frames"), [(2, 1), (2, 3), (3, 1), (3, 4)])
def test_an_image_is_judged_alike_in_any_batch(dims: int, frames: int) -> None:
    model = build(dims=dims)
    pixels = torch.randn(3, frames, 3, 16, 24)
    logits = model(pixels)
    # 16 x 24 pixels are 4 x 6 after two levels of stride 2 and 2 x 4 after two convolutions of stride 1.
    times = frames if dims == 2 else (frames + 3) // 4
    assert logits.shape == (3, times * 2 * 4)
    torch.testing.assert_close(model(pixels[1:2]), logits[1:2], rtol=1e-5, atol=1e-7)


def test_three_layers_see_70_pixels() -> None:
    model = build(layers=3, base_channels=2, norm_groups=1)
    # GroupNorm looks at the whole image; without it a patch alone decides.
    model.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in model.norms)
    pixels = torch.zeros(1, 1, 3, 96, 96, requires_grad=True)
    side = 96 // 8 - 2
    logits = model(pixels).view(side, side)
    (gradient,) = torch.autograd.grad(logits[side // 2, side // 2], pixels)
    seen = gradient[0, 0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_time_is_looked_at_in_three_dimensions_alone() -> None:
    clip = torch.randn(1, 4, 3, 16, 16)
    for dims in (2, 3):
        model = build(dims=dims)
        backwards = model(clip.flip(1))
        forwards = model(clip)
        same = torch.allclose(forwards.sort(1).values, backwards.sort(1).values, rtol=1e-4)
        assert same == (dims == 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 1}, r"dims=1 must be 2 \(frames\) or 3 \(clips\)"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"norm_groups": 3}, "norm_groups=3 must divide the channels of every level but the first: 8, 16"),
    ],
)
def test_what_makes_no_network_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_small_images_are_one_line() -> None:
    with pytest.raises(ConfigError, match="layers=2 needs images of at least 12 pixels a side, not 8"):
        build()(torch.zeros(1, 1, 3, 8, 16))
