"""Reconstruction metrics: against torchmetrics and written-out sums, over batches and without fillers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.types import PixelBatch
from cantata.models.protocol import TokenizerOutput
from cantata.nn.perceptual.frechet import Moments, frechet_distance
from cantata.nn.quantize.base import Quantized, usage
from cantata.train.image_metrics import ImageMetrics, code_metrics, psnr, ssim
from cantata.train.metrics import StepSums
from tests.train.pixels import images, joined
from tests.train.test_reconstruction import Brightness

SIDE = 16


def noisy(batch: PixelBatch, noise: float = 0.2) -> TokenizerOutput:
    """The batch's own pixels with noise, some of it out of range, and one code per image."""
    pixels = batch.pixels_BTCHW.float() / 127.5 - 1
    generator = torch.Generator().manual_seed(int(batch.pixels_BTCHW.sum()))
    pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
    indices_N = (batch.pixels_BTCHW[:, 0, 0, 0, 0] % 7).long()
    nothing = torch.zeros(())
    quantized = Quantized(nothing, indices_N, nothing, {}, usage(indices_N, 7), {})
    return TokenizerOutput(pixels, quantized, nothing)


def reduced(metrics: ImageMetrics, *batches: PixelBatch) -> dict[str, Tensor]:
    sums = StepSums()
    for batch in batches:
        sums.add(metrics.sums(batch, noisy(batch)))
    return sums.reduced()


def test_ssim_and_psnr_are_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    real = images(3, side=24).pixels_BTCHW[:, 0].double()
    # Noise on half the picture, so that structure is neither all lost nor all kept.
    fake = real.clone()
    fake[..., :12] = (fake[..., :12] + 60 * torch.randn(3, 3, 24, 12)).clamp(0, 255)
    wanted = functional.structural_similarity_index_measure(
        fake, real, data_range=255.0, reduction="none", sigma=1.5, kernel_size=11
    )
    torch.testing.assert_close(ssim(real, fake), wanted.double(), rtol=0, atol=1e-5)
    each = [
        functional.peak_signal_noise_ratio(f, r, data_range=255.0) for f, r in zip(fake, real, strict=True)
    ]
    torch.testing.assert_close(psnr(real, fake), torch.stack(each).double(), rtol=1e-6, atol=0)


def test_equal_images_are_perfect() -> None:
    x = images(2, side=SIDE).pixels_BTCHW[:, 0].double()
    torch.testing.assert_close(ssim(x, x), torch.ones(2).double())
    assert psnr(x, x).tolist() == [100.0, 100.0]


def test_sums_over_batches_are_those_of_one_and_leave_fillers_out() -> None:
    metrics = ImageMetrics(Brightness())
    parts = [images(3, seed=1, side=SIDE), images(2, seed=2, side=SIDE)]
    whole = joined(parts)
    # The noise of each image must be that of its own batch.
    output = TokenizerOutput(
        torch.cat([noisy(part).reconstruction_BTCHW for part in parts]),
        noisy(whole).quantized,
        torch.zeros(()),
    )
    wanted = metrics.metrics(metrics.sums(whole, output))
    found = metrics.metrics(reduced(metrics, *parts))
    assert found == pytest.approx(wanted, rel=1e-9)
    assert set(found) == {
        f"eval/{name}"
        for name in ("images", "psnr", "ssim", "brightness", "frechet_means", "usage", "perplexity")
    }
    assert found["eval/images"] == 5

    filled = PixelBatch(
        whole.pixels_BTCHW,
        torch.tensor([True, True, True, False, False]),
        whole.keys[:3],
        whole.codes_per_image,
    )
    sums = metrics.sums(filled, output)
    assert metrics.metrics(sums) == pytest.approx(metrics.metrics(reduced(metrics, parts[0])), rel=1e-9)
    nothing = PixelBatch(whole.pixels_BTCHW, torch.zeros(5, dtype=torch.bool), (), whole.codes_per_image)
    empty = metrics.sums(nothing, output)
    assert all(not value.any() for value in empty.values())
    assert metrics.metrics(empty)["eval/psnr"] is None
    assert metrics.metrics(empty)["eval/frechet_means"] is None


def test_values_beyond_eight_bits_are_clamped() -> None:
    batch = images(1, side=SIDE)
    batch.pixels_BTCHW.fill_(255)
    pixels = torch.full(batch.pixels_BTCHW.shape, 1.7)
    output = TokenizerOutput(pixels, noisy(batch).quantized, torch.zeros(()))
    assert ImageMetrics(None).sums(batch, output)["images/psnr"] == 100.0


def test_a_clip_is_the_mean_of_its_frames() -> None:
    clip = images(1, frames=4, side=SIDE)
    frames = PixelBatch(clip.pixels_BTCHW.transpose(0, 1), torch.ones(4, dtype=torch.bool), ("f",) * 4, 1)
    output = noisy(clip)
    each = TokenizerOutput(
        output.reconstruction_BTCHW.transpose(0, 1), noisy(frames).quantized, torch.zeros(())
    )
    metrics = ImageMetrics(Brightness())
    of_clip, of_frames = (
        metrics.metrics(metrics.sums(clip, output)),
        metrics.metrics(metrics.sums(frames, each)),
    )
    assert of_clip["eval/images"] == 1
    for name in ("psnr", "ssim", "brightness"):
        assert of_clip[f"eval/{name}"] == pytest.approx(of_frames[f"eval/{name}"])


class Colours:
    """Stands in for Inception: the mean of each colour."""

    def features(self, x_BCHW: Tensor) -> Tensor:
        assert torch.equal(x_BCHW, x_BCHW.round())
        return x_BCHW.mean((2, 3))


def test_rfid_is_of_whole_pixels_and_adds_up() -> None:
    inception: Any = Colours()
    metrics, parts = (
        ImageMetrics(None, inception),
        [images(3, seed=1, side=SIDE), images(2, seed=2, side=SIDE)],
    )
    found = metrics.metrics(reduced(metrics, *parts))["eval/rfid"]
    real = torch.cat([part.pixels_BTCHW[:, 0] for part in parts]).double()
    fake = torch.cat([noisy(part).reconstruction_BTCHW[:, 0] for part in parts]).double()
    fake = ((fake + 1) * 127.5).clamp(0, 255).round()
    wanted = frechet_distance(*(Moments.of(x.mean((2, 3))) for x in (real, fake)))
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found > 0
    assert "eval/rfid" not in ImageMetrics(None).metrics(reduced(ImageMetrics(None), *parts))


def test_perplexity_counts_evenly_used_codes() -> None:
    assert code_metrics(torch.tensor([4, 4, 0, 4])) == pytest.approx({"usage": 0.75, "perplexity": 3.0})
    uneven = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    both = code_metrics(torch.tensor([[1, 3], [2, 2]]), "eval/")
    assert both == pytest.approx({"eval/usage": 1.0, "eval/perplexity": (uneven + 2) / 2})
    assert code_metrics(torch.zeros(3)) == {"usage": None, "perplexity": None}
