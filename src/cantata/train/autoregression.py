"""What AIMv2's encoder learns by: the next patch and the next token (Fini et al., 2024, arXiv:2411.14402).

R  predicted patches    C  values of a patch
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import IMAGE, Batch, StepTotals
from cantata.models.protocol import PatchOutput, PatchPredictor
from cantata.train.engine import Loss
from cantata.train.metrics import PARTS, Record, part_metrics
from cantata.train.objectives import token_sums

_EPS = 1e-6
"""Added to a patch's variance, as MAE does."""


class MultimodalAutoregression:
    """Cross entropy of the text plus `image_weight` times the squared error of normalised patches.

    A sample's loss is the mean over its tokens of their cross entropy, times `text_weight`, plus for each of
    its images the mean over the predicted patches (those after the prefix) of their squared error, times
    `image_weight`; a step's is the mean over samples, on all ranks and in all micro-batches. A patch is
    normalised by its own mean and variance (MAE, arXiv:2111.06377), and its error is a mean over its values.

    Args:
        model: what is trained.
        image_weight: 0.4 as published; 0 learns text alone.
        text_weight: 1 as published; 0 learns pixels alone.

    Raises:
        ConfigError: weights that are negative or both 0, or a model that predicts no patches.
    """

    def __init__(self, model: nn.Module, image_weight: float, text_weight: float) -> None:
        if not isinstance(model, PatchPredictor):
            raise ConfigError(f"objective=multimodal: {type(model).__name__} predicts no patches")
        for name, weight in (("image_weight", image_weight), ("text_weight", text_weight)):
            if not 0 <= weight < math.inf:
                raise ConfigError(f"objective.{name}={weight} must be a number, at least 0")
        if not image_weight and not text_weight:
            raise ConfigError("objective.image_weight and text_weight are both 0: nothing would be learned")
        self.image_weight = image_weight
        self.text_weight = text_weight

    def __call__(self, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
        if self.image_weight and batch.images.prefix is None:
            raise ConfigError(
                f"objective.image_weight={self.image_weight} predicts no patches, because the collator draws "
                "no prefix; set collator._target_=cantata.data.collate.PrefixCollator or image_weight=0"
            )
        output: PatchOutput = model(batch)
        pixel_sum = patch_error(output, batch)
        text = self.text_weight * output.loss_sum
        pixels = self.image_weight * pixel_sum
        sums = token_sums(output.loss_N, batch)
        sums["loss_sum_M"] = self.text_weight * sums["loss_sum_M"]
        sums["loss_sum_M"][IMAGE] += pixels.detach()
        sums["loss_sum"] = (text + pixels).detach()
        sums[f"{PARTS}tokens"], sums[f"{PARTS}patches"] = output.loss_sum.detach(), pixel_sum.detach()
        return Loss((text + pixels) / totals.target_weight, sums)

    def measured(self, sums: Mapping[str, Tensor]) -> Record:
        """What an evaluation adds to the losses: the two terms; `sums` are reduced over ranks."""
        return part_metrics(sums, "eval/")


def patch_error(output: PatchOutput, batch: Batch) -> Tensor:
    """Of each image the mean over its predicted patches of their squared error; the sum over images, fp32."""
    index_R, share_R = (x.to(output.patches_PC.device, non_blocking=True) for x in batch.images.predicted())
    wanted_RC = normalised(output.patches_PC.index_select(0, index_R))
    error_R = (output.predicted_RC.float() - wanted_RC).square().mean(1)
    return (error_R * share_R).sum()


def normalised(patches_RC: Tensor) -> Tensor:
    """Each patch less its mean, over its standard deviation (with Bessel's correction); fp32."""
    patches_RC = patches_RC.float()
    centred_RC = patches_RC - patches_RC.mean(1, keepdim=True)
    variance_R1 = centred_RC.square().sum(1, keepdim=True) / (patches_RC.shape[1] - 1)
    return centred_RC / (variance_R1 + _EPS).sqrt()
