"""Losses against their formulas, and the last layer's gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cantata.train.adversarial import (
    Adversarial,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer_gradient,
    lecam,
)

REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
FAKE = torch.tensor([[-2.0, 0.5], [1.0, 0.0]])
ONE = torch.ones(())


def test_hinge() -> None:
    # Real: relu(1 - x) is 0, .5 and 2, 1; fake: relu(1 + x) is 0, 1.5 and 2, 1.
    assert discriminator_loss(Adversarial.hinge, REAL, FAKE).tolist() == [0.5, 1.5]
    assert generator_loss(Adversarial.hinge, FAKE).tolist() == [0.75, -0.5]


def test_non_saturating_is_cross_entropy() -> None:
    bce = nn.functional.binary_cross_entropy_with_logits
    one, zero = torch.ones_like(REAL), torch.zeros_like(REAL)
    wanted = (bce(REAL, one, reduction="none") + bce(FAKE, zero, reduction="none")).mean(1) / 2
    torch.testing.assert_close(discriminator_loss(Adversarial.non_saturating, REAL, FAKE), wanted)
    wanted = bce(FAKE, one, reduction="none").mean(1)
    torch.testing.assert_close(generator_loss(Adversarial.non_saturating, FAKE), wanted)


def test_lecam_pulls_each_to_the_mean_of_the_other() -> None:
    found = lecam(REAL, FAKE, torch.tensor(0.5), torch.tensor(-0.5))
    wanted = [(2.5**2 + 1) / 2 + (2.5**2 + 0) / 2, (0.25 + 0.25) / 2 + (0.25 + 0.25) / 2]
    assert found.tolist() == pytest.approx(wanted)


def convolution(dims: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, what it reads of 2 clips of 4 frames, and its reconstruction (B, T, C, H, W)."""
    torch.manual_seed(0)
    if dims == 2:
        layer, x = nn.Conv2d(4, 3, (3, 5), padding=(1, 2), bias=False), torch.randn(8, 4, 6, 7)
        return layer, x, layer(x).unflatten(0, (2, 4))
    layer, x = nn.Conv3d(4, 3, 3, padding=1), torch.randn(2, 4, 4, 6, 7)
    return layer, x, layer(x).transpose(1, 2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kept", [4, 1])
def test_the_last_layer_has_autograds_gradient(dims: int, kept: int) -> None:
    layer, last_input, reconstruction = convolution(dims)
    given = reconstruction[:, :kept]
    loss = given.pow(3).mean()
    (wanted,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, given)
    torch.testing.assert_close(last_layer_gradient(last_input, layer, gradient), wanted, rtol=1e-5, atol=1e-8)


def test_the_adaptive_weight_is_the_ratio_of_norms_of_means() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    wanted = a.norm() / (b.norm() + 1e-4)
    torch.testing.assert_close(adaptive_weight(a, b, ONE), wanted)
    # A quarter of the step's images has a quarter of each gradient.
    torch.testing.assert_close(adaptive_weight(a / 4, b / 4, ONE / 4), wanted)
    assert adaptive_weight(a, 0 * b, ONE).item() == 1e4
    assert adaptive_weight(a * 1e-3, 0 * b, ONE).item() == pytest.approx(a.norm().item() * 10)
