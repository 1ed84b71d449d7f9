"""How well images and clips are reconstructed, over a whole held-out set and all ranks.

B  images or clips    T  frames    C  channels    H, W  rows and columns    K  codes    R  codebooks
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.core.types import PixelBatch
from cantata.models.protocol import TokenizerOutput
from cantata.nn.perceptual.base import Perceptual
from cantata.nn.perceptual.frechet import Moments, frechet_distance
from cantata.nn.perceptual.inception import Inception
from cantata.nn.quantize.base import Quantized, usage
from cantata.train.metrics import Record

USAGE = "codes/usage_K"
"""Name of the sum of codes' counts."""
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
"""Of SSIM, as published: pixels of the Gaussian window and its deviation, and two constants."""
FRECHET, RFID = "frechet/", "rfid/"
"""Prefixes of the moments of features, of the perceptual network and of Inception."""
HIGHEST_PSNR = 100.0
"""Decibels of a frame without any error, whose ratio would be infinite."""


class ImageMetrics:
    """Sums over images, and what they come to once every image has been seen.

    Pixels are clamped to the range of 8-bit values and not rounded. A clip's values are means over frames.

    Args:
        perceptual: adds its distance, and the Frechet distance of its features between originals and
            reconstructions, both under its name; None adds neither. Its distance is LPIPS only where the
            network is that of LPIPS, and the Frechet distance is never rFID.
        inception: adds rFID, the Frechet distance of its features on pixels rounded to 8 bits; None leaves it
            out.
    """

    def __init__(self, perceptual: Perceptual | None, inception: Inception | None = None) -> None:
        self.perceptual = perceptual
        self.inception = inception

    @torch.no_grad()
    def sums(self, batch: PixelBatch, output: TokenizerOutput) -> dict[str, Tensor]:
        """What adds up over batches and ranks, of the batch's real images."""
        real_BTCHW = batch.pixels_BTCHW[batch.is_real_B].double()
        fake_BTCHW = _eight_bits(output.reconstruction_BTCHW[batch.is_real_B])
        frames = real_BTCHW.shape[1]
        real_FCHW, fake_FCHW = real_BTCHW.flatten(0, 1), fake_BTCHW.flatten(0, 1)
        sums = {
            "images/count": torch.tensor(len(real_BTCHW), device=real_BTCHW.device),
            "images/psnr": psnr(real_FCHW, fake_FCHW).sum() / frames,
            "images/ssim": ssim(real_FCHW, fake_FCHW).sum() / frames,
            USAGE: real_usage(batch, output.quantized),
        }
        if self.perceptual is not None:
            sums |= self._perceived(self.perceptual, real_FCHW, fake_FCHW, frames)
        if self.inception is not None:
            sums |= _moments("real", self.inception.features(real_FCHW), RFID)
            sums |= _moments("fake", self.inception.features(fake_FCHW.round()), RFID)
        return sums

    def metrics(self, sums: Mapping[str, Tensor]) -> Record:
        """`eval/psnr` (dB), `eval/ssim`, `eval/<distance>`, `eval/frechet_<features>`, `eval/rfid`,
        `eval/usage`, `eval/perplexity` and `eval/images`, from reduced sums."""
        count = sums["images/count"].item()
        record: Record = {"eval/images": int(count)}
        names = ["psnr", "ssim", *([] if self.perceptual is None else [self.perceptual.name])]
        for name in names:
            record[f"eval/{name}"] = sums[f"images/{name}"].item() / count if count else None
        if self.perceptual is not None:
            record[f"eval/frechet_{self.perceptual.features_name}"] = _distance(sums, FRECHET)
        if self.inception is not None:
            record["eval/rfid"] = _distance(sums, RFID)
        return record | code_metrics(sums[USAGE], "eval/")

    @staticmethod
    def _perceived(
        perceptual: Perceptual, real_FCHW: Tensor, fake_FCHW: Tensor, frames: int
    ) -> dict[str, Tensor]:
        real_FCHW, fake_FCHW = (x.float() / 127.5 - 1.0 for x in (real_FCHW, fake_FCHW))
        distance = perceptual.distance(real_FCHW, fake_FCHW).double().sum() / frames
        sums = {f"images/{perceptual.name}": distance}
        for side, x_FCHW in (("real", real_FCHW), ("fake", fake_FCHW)):
            sums |= _moments(side, perceptual.features(x_FCHW), FRECHET)
        return sums


def _moments(side: str, features_NF: Tensor, prefix: str) -> dict[str, Tensor]:
    parts = Moments.of(features_NF)._asdict()
    return {f"{prefix}{side}/{name}": part for name, part in parts.items()}


def _distance(sums: Mapping[str, Tensor], prefix: str) -> float | None:
    """None of fewer than two images."""
    real, fake = (
        Moments(*(sums[f"{prefix}{side}/{part}"] for part in Moments._fields)) for side in ("real", "fake")
    )
    return frechet_distance(real, fake) if real.images > 1 else None


def psnr(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, (B,), of values from 0 to 255."""
    error_B = (x_BCHW - y_BCHW).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error_B)).clamp(max=HIGHEST_PSNR)


def ssim(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), of values from 0 to 255 (Wang et al. 2004).

    Per channel, under a Gaussian window around every position, beyond the edges of the mirrored image; a
    mean over positions and channels. Give fp64: variances are small differences of large squares.
    """
    mean_x, mean_y = _blur(x_BCHW), _blur(y_BCHW)
    variance_x = (_blur(x_BCHW.square()) - mean_x.square()).clamp(min=0)
    variance_y = (_blur(y_BCHW.square()) - mean_y.square()).clamp(min=0)
    covariance = _blur(x_BCHW * y_BCHW) - mean_x * mean_y
    c1, c2 = (K1 * 255.0) ** 2, (K2 * 255.0) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def real_usage(batch: PixelBatch, quantized: Quantized) -> Tensor:
    """Rows of the batch's real images that got each code: (K,) or (R, K), int64."""
    count = len(batch.is_real_B)
    if len(batch.keys) == count:
        return quantized.usage_K
    rows_BN = quantized.indices_N.view(count, -1, *quantized.indices_N.shape[1:])
    return usage(rows_BN[batch.is_real_B].flatten(0, 1), quantized.usage_K.shape[-1])


def code_metrics(usage_K: Tensor, prefix: str = "") -> Record:
    """`usage`, the share of codes that occur, and `perplexity`: as many, used evenly, would be as varied.

    Of a residual quantiser (R, K): means over its codebooks. Counts must be those of all ranks.
    """
    counts_RK = usage_K.double().reshape(-1, usage_K.shape[-1])
    total = counts_RK.sum().item()
    if not total:
        return {f"{prefix}usage": None, f"{prefix}perplexity": None}
    share_RK = counts_RK / counts_RK.sum(1, keepdim=True)
    entropy_R = -torch.special.xlogy(share_RK, share_RK).sum(1)
    return {
        f"{prefix}usage": (counts_RK > 0).double().mean().item(),
        f"{prefix}perplexity": entropy_R.exp().mean().item(),
    }


def _eight_bits(x: Tensor) -> Tensor:
    """Values from -1 to 1, as fp64 from 0 to 255."""
    return ((x.double() + 1.0) * 127.5).clamp(0.0, 255.0)


def _blur(x_BCHW: Tensor) -> Tensor:
    """The Gaussian mean around every position."""
    offsets = torch.arange(WINDOW, dtype=x_BCHW.dtype, device=x_BCHW.device) - (WINDOW - 1) / 2
    weights = torch.exp(-((offsets / SIGMA) ** 2) / 2)
    weights = weights / weights.sum()
    channels = x_BCHW.shape[1]
    down = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    across = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    padded = F.pad(x_BCHW, (WINDOW // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, down, groups=channels), across, groups=channels)
