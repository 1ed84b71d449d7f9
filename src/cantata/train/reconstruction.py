"""What an image tokenizer learns by: pixels, perception, its quantiser and a critic.

B  images or clips    T  frames    C  channels    H, W  rows and columns    K  codes    M  modalities
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import IMAGE, MODALITIES, VIDEO, PixelBatch, StepTotals
from cantata.models.protocol import TokenizerOutput
from cantata.nn.perceptual.base import Perceptual
from cantata.train.engine import Loss
from cantata.train.image_metrics import USAGE, ImageMetrics, code_metrics, real_usage
from cantata.train.metrics import PARTS, Record, part_metrics

if TYPE_CHECKING:
    from cantata.train.critic import Critic

STATISTICS = "statistics/"
"""Prefix of what `Quantizer.update` wants, summed over the step."""


@dataclass(frozen=True)
class LossConfig:
    """How much each way in which a reconstruction differs from its image costs."""

    l1: float
    """Of the mean absolute difference of pixel values, which go from -1 to 1."""
    l2: float
    """Of the mean squared one."""
    perceptual: float
    """Of the distance that `perceptual` measures."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if not 0 <= value < math.inf:
                raise ConfigError(f"loss.{name}={value} must be a number, at least 0")
        if not any(values.values()):
            raise ConfigError(f"loss: {', '.join(values)} are all 0; a reconstruction needs one of them")


class Reconstruction:
    """The loss of an image tokenizer.

    The step's loss is `sum(values * loss of an image) / sum(values) + sum(quantiser's loss) / codes`, each
    sum over all ranks and micro-batches, where an image's loss is a mean over its pixel values (and, of
    networks' terms, over their positions). So it does not depend on how micro-batches share the images.

    Engines own the model's parameters, and the critic's weight needs the terms' gradients one by one. So
    terms are taken on a detached copy of the reconstruction, and the loss that goes back to the engine is
    `sum(reconstruction * d loss / d reconstruction)`: its gradient is exactly theirs.

    Without gradients it measures reconstructions alone: neither quantiser nor critic, and only real images.

    Args:
        loss: coefficients.
        perceptual: measures what `loss.perceptual` weighs; None without.
        critic: judges reconstructions, and learns to; None without.
        last_layer: the model's; only its shape is read.
        metrics: what evaluations add; None for the losses alone.

    Raises:
        ConfigError: `loss.perceptual` has nothing to measure it.
    """

    def __init__(
        self,
        loss: LossConfig,
        perceptual: Perceptual | None,
        critic: Critic | None,
        last_layer: nn.Module,
        metrics: ImageMetrics | None,
    ) -> None:
        if loss.perceptual and perceptual is None:
            raise ConfigError(
                f"loss.perceptual={loss.perceptual} needs a network: set perceptual=mobilenet or lpips, or "
                "loss.perceptual=0"
            )
        self.loss = loss
        self.perceptual = perceptual
        self.critic = critic
        self.last_layer = last_layer
        self.metrics = metrics

    def __call__(self, model: nn.Module, batch: PixelBatch, totals: StepTotals) -> Loss:
        real_BTCHW = normalise(batch.pixels_BTCHW)
        output: TokenizerOutput = model(real_BTCHW)
        values_B = batch.is_real_B.double() * real_BTCHW[0].numel()
        if torch.is_grad_enabled():
            return self._learn(output, real_BTCHW, values_B, batch, totals)
        terms = self._terms(real_BTCHW, output.reconstruction_BTCHW.float())
        loss_B = self._weighted(terms)
        sums = _sums(loss_B, terms, values_B, batch)
        if self.metrics is None:
            sums[USAGE] = real_usage(batch, output.quantized)
        else:
            sums |= self.metrics.sums(batch, output)
        return Loss(sums["loss_sum"] / totals.target_weight, sums)

    def measured(self, sums: Mapping[str, Tensor]) -> Record:
        """What an evaluation adds to the losses; `sums` are reduced over ranks."""
        images = {} if self.metrics is None else self.metrics.metrics(sums)
        return tokenizer_metrics(sums, "eval/") | images

    def _learn(
        self,
        output: TokenizerOutput,
        real_BTCHW: Tensor,
        values_B: Tensor,
        batch: PixelBatch,
        totals: StepTotals,
    ) -> Loss:
        fake_BTCHW = output.reconstruction_BTCHW.detach().float().requires_grad_()
        share_B = (values_B / totals.target_weight).float()
        terms = self._terms(real_BTCHW, fake_BTCHW)
        loss_B = self._weighted(terms)
        (gradient,) = torch.autograd.grad((loss_B * share_B).sum(), fake_BTCHW)
        if self.critic is not None:
            judged = self.critic.judge(fake_BTCHW, gradient, share_B, output.last_input, self.last_layer)
            if judged is not None:
                loss_B = loss_B + judged.weight * judged.loss_B
                gradient = gradient + judged.gradient_BTCHW
                terms["adversarial"] = judged.loss_B
                terms["adaptive_weight"] = judged.weight.expand_as(loss_B)
            terms |= self.critic.learn(real_BTCHW, fake_BTCHW.detach(), share_B)

        quantized = output.quantized
        sums = _sums(loss_B, terms, values_B, batch)
        values_per_code = totals.target_weight / totals.tokens
        of_codes = quantized.loss_sum.detach().double() * values_per_code
        sums["loss_sum"] += of_codes
        sums["loss_sum_M"][_modality(batch)] += of_codes
        sums |= {f"{PARTS}{name}": value * values_per_code for name, value in quantized.parts.items()}
        sums[USAGE] = quantized.usage_K
        sums |= {f"{STATISTICS}{name}": value for name, value in quantized.statistics.items()}

        surrogate = (output.reconstruction_BTCHW * gradient).sum() + quantized.loss_sum / totals.tokens
        value = sums["loss_sum"] / totals.target_weight
        return Loss(surrogate + (value - surrogate.detach()).to(surrogate.dtype), sums)

    def _terms(self, real_BTCHW: Tensor, fake_BTCHW: Tensor) -> dict[str, Tensor]:
        """What each term that counts says of each image, (B,), without its coefficient."""
        difference = (fake_BTCHW - real_BTCHW).flatten(1)
        terms = {}
        if self.loss.l1:
            terms["l1"] = difference.abs().mean(1)
        if self.loss.l2:
            terms["l2"] = difference.square().mean(1)
        if self.loss.perceptual and self.perceptual is not None:
            distance = self.perceptual.distance(real_BTCHW.flatten(0, 1), fake_BTCHW.flatten(0, 1))
            terms[self.perceptual.name] = distance.view(real_BTCHW.shape[:2]).mean(1)
        return terms

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        coefficients = {"l1": self.loss.l1, "l2": self.loss.l2}
        weighted = [coefficients.get(name, self.loss.perceptual) * term for name, term in terms.items()]
        return torch.stack(weighted).sum(0)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to fp32 from -1 to 1."""
    return pixels.float() / 127.5 - 1.0


def tokenizer_metrics(sums: Mapping[str, Tensor], prefix: str = "") -> Record:
    """`loss/<term>` for each term of the loss, without its coefficient, and what the codes' counts say.

    `sums` are `Reconstruction`'s, reduced over ranks.
    """
    return part_metrics(sums, prefix) | code_metrics(sums[USAGE], prefix)


def _sums(
    loss_B: Tensor, terms: Mapping[str, Tensor], values_B: Tensor, batch: PixelBatch
) -> dict[str, Tensor]:
    """What adds up over micro-batches and ranks: means of images times their numbers of values, fp64."""
    loss_sum = (loss_B.detach() * values_B).sum()

    def of_modality(value: Tensor | int) -> Tensor:
        by_modality_M = torch.zeros(len(MODALITIES), dtype=torch.float64, device=loss_sum.device)
        by_modality_M[_modality(batch)] = value
        return by_modality_M

    sums = {
        "loss_sum": loss_sum,
        "loss_sum_M": of_modality(loss_sum),
        "target_weight_M": of_modality(values_B.sum()),
        "targets_M": of_modality(batch.num_targets),
        # Attention runs over an image's codes: its share of the operations follows this.
        "squared_lengths": values_B.new_tensor(float(batch.num_tokens * batch.codes_per_image)),
    }
    parts = {f"{PARTS}{name}": (term.detach() * values_B).sum() for name, term in terms.items()}
    return sums | parts


def _modality(batch: PixelBatch) -> int:
    return IMAGE if batch.pixels_BTCHW.shape[1] == 1 else VIDEO
