"""The tokenizer's loss: written out, split over micro-batches, by term, and in evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.core.types import IMAGE, VIDEO, PixelBatch
from cantata.nn.quantize.base import usage
from cantata.train.evaluate import UNSCALED
from cantata.train.metrics import StepSums, loss_metrics
from cantata.train.reconstruction import LossConfig, Reconstruction, normalise, tokenizer_metrics
from tests.train.pixels import CODES, Tokenizer, images, joined, tokenizer, totals_of

WEIGHTS = LossConfig(l1=0.7, l2=0.3, perceptual=2.0)


class Brightness:
    """A distance whose gradient is plain: the squared difference of mean values."""

    name = "brightness"
    features_name = "means"

    def distance(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        return (x_BCHW.detach().mean((1, 2, 3)) - y_BCHW.mean((1, 2, 3))).square()

    def features(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean((2, 3))


def objective(model: Tokenizer, weights: LossConfig = WEIGHTS) -> Reconstruction:
    return Reconstruction(weights, Brightness(), None, model.last_layer, None)


def written_out(model: Tokenizer, batch: PixelBatch) -> Tensor:
    real = normalise(batch.pixels_BTCHW)
    output = model(real)
    fake = output.reconstruction_BTCHW
    frames = Brightness().distance(real.flatten(0, 1), fake.flatten(0, 1))
    loss = 0.7 * (fake - real).abs().mean() + 0.3 * (fake - real).square().mean() + 2 * frames.mean()
    return loss + output.quantized.loss_sum / batch.num_tokens


def step(batches: list[PixelBatch], dims: int = 2) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Value, gradients and sums of a step made of these micro-batches."""
    model, sums, total = tokenizer(dims), StepSums(), totals_of(batches)
    values = []
    for batch in batches:
        loss = objective(model)(model, batch, total)
        loss.value.backward()
        values.append(loss.value.detach())
        sums.add(loss.sums)
    return torch.stack(values).sum(), [p.grad for p in model.parameters()], sums.reduced()


@pytest.mark.parametrize(("dims", "frames"), [(2, 1), (2, 3), (3, 3)])
def test_value_and_gradient_are_those_of_the_loss_written_out(dims: int, frames: int) -> None:
    batch, model = images(3, frames=frames), tokenizer(dims)
    wanted = written_out(model, batch)
    wanted_gradients = torch.autograd.grad(wanted, list(model.parameters()))
    value, gradients, sums = step([batch], dims)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, list(wanted_gradients), rtol=1e-5, atol=1e-7)
    assert loss_metrics(sums)["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    modality = "image" if frames == 1 else "video"
    assert loss_metrics(sums)[f"loss/{modality}"] == pytest.approx(wanted.item(), rel=1e-6)
    assert sums["targets_M"][IMAGE if frames == 1 else VIDEO] == batch.num_tokens
    assert sums["squared_lengths"] == 3 * batch.codes_per_image**2


def test_shares_of_micro_batches_add_up_to_the_one_batch() -> None:
    parts = [images(2, seed=1), images(3, seed=2)]
    value, gradients, sums = step(parts)
    wanted_value, wanted_gradients, wanted_sums = step([joined(parts)])
    torch.testing.assert_close(value, wanted_value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-5, atol=1e-7)
    assert sums.keys() == wanted_sums.keys()
    for name, wanted in wanted_sums.items():
        torch.testing.assert_close(sums[name], wanted, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["l1", "l2", "perceptual"])
def test_every_coefficient_changes_the_loss(name: str) -> None:
    model, batch = tokenizer(), images(2)
    total = totals_of([batch])
    before = objective(model)(model, batch, total)
    doubled = replace(WEIGHTS, **{name: 2 * getattr(WEIGHTS, name)})
    after = objective(model, doubled)(model, batch, total)
    term = "parts/brightness" if name == "perceptual" else f"parts/{name}"
    added = getattr(WEIGHTS, name) * before.sums[term] / total.target_weight
    assert added > 0
    torch.testing.assert_close(after.value.double(), before.value.double() + added, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss.value, model.last.weight)[0] for loss in (before, after)]
    assert not torch.allclose(*gradients)


def test_sums_name_every_term() -> None:
    _, _, sums = step([images(2)])
    real = normalise(images(2).pixels_BTCHW)
    output = tokenizer()(real)
    record = tokenizer_metrics(sums)
    assert record["loss/l1"] == pytest.approx((output.reconstruction_BTCHW - real).abs().mean().item())
    rows = output.quantized.indices_N.numel()
    commitment = output.quantized.parts["commitment"].item() / rows
    assert record["loss/commitment"] == pytest.approx(commitment)
    assert set(record) == {
        *(f"loss/{name}" for name in ("l1", "l2", "brightness", "codebook", "commitment")),
        "usage",
        "perplexity",
    }
    assert sums["codes/usage_K"].sum() == rows
    assert sums["statistics/rows_KD"].shape == (CODES, 4)


def test_evaluation_measures_real_images_alone() -> None:
    model, batch = tokenizer(), images(2, fillers=2)
    with torch.no_grad():
        loss = objective(model)(model, batch, UNSCALED)
        alone = objective(model)(model, images(2, fillers=0), UNSCALED)
        model_output = model(normalise(batch.pixels_BTCHW[:2]))
    real = normalise(batch.pixels_BTCHW[:2])
    fake = model_output.reconstruction_BTCHW
    means = Brightness().distance(real.flatten(0, 1), fake.flatten(0, 1)).mean()
    wanted = 0.7 * (fake - real).abs().mean() + 0.3 * (fake - real).square().mean() + 2 * means
    assert loss_metrics(loss.sums)["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(loss.sums["codes/usage_K"], usage(model_output.quantized.indices_N, CODES))
    assert loss.sums["targets_M"].sum() == batch.num_tokens
    assert not any("commitment" in name or name.startswith("statistics/") for name in loss.sums)
    with_pixels_of_seed_zero = images(2, fillers=0).pixels_BTCHW
    assert torch.equal(with_pixels_of_seed_zero, batch.pixels_BTCHW[:2])
    for name, value in alone.sums.items():
        torch.testing.assert_close(loss.sums[name], value, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l1": -1.0}, r"loss\.l1=-1\.0 must be a number, at least 0"),
        ({"l2": float("nan")}, r"loss\.l2=nan"),
        ({"l1": 0.0, "l2": 0.0, "perceptual": 0.0}, "are all 0"),
    ],
)
def test_bad_coefficients_are_one_line(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(WEIGHTS, **change)


def test_perception_needs_a_network() -> None:
    with pytest.raises(ConfigError, match=r"set perceptual=mobilenet or lpips, or loss\.perceptual=0"):
        Reconstruction(WEIGHTS, None, None, tokenizer().last_layer, None)
