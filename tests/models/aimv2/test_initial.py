"""Initial values that the family's models share."""

from __future__ import annotations

import math

import pytest
import torch

from cantata.models.aimv2.initial import init_parameter


def filled(name: str, *shape: int, std: float = 0.3) -> torch.Tensor:
    tensor = torch.full(shape, 7.0)
    init_parameter(name, tensor, torch.Generator().manual_seed(0), std)
    return tensor


@pytest.mark.parametrize(
    "name", ["vision.rms_norm.weight", "vision.layers.0.rms_norm2.weight", "head.norm.weight"]
)
def test_norms_begin_at_one(name: str) -> None:
    assert torch.equal(filled(name, 5), torch.ones(5))


@pytest.mark.parametrize("name", ["pixel_head.output.bias", "vision.head.output_proj.bias"])
def test_biases_begin_at_zero(name: str) -> None:
    assert torch.equal(filled(name, 5), torch.zeros(5))


def test_the_scale_begins_at_clips() -> None:
    assert filled("logit_scale", 1).exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("name", ["text.layers.0.ffn.up_proj.weight", "vision.head.cls_token"])
def test_the_rest_is_normal(name: str) -> None:
    """The range of 10,000 draws: the deviation of a deviation is std / sqrt(2 * 10,000)."""
    found = filled(name, 100, 100)
    assert abs(found.std().item() - 0.3) < 4 * 0.3 / math.sqrt(20_000)
    assert abs(found.mean().item()) < 4 * 0.3 / 100
    assert torch.equal(found, filled(name, 100, 100))
