"""What a contrastive model learns by: which image and which text belong together (CLIP, arXiv:2103.00020).

n  pairs of this rank's micro-batch    N  pairs of all ranks'    D  width of the shared space
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.errors import ConfigError, RunError
from cantata.core.gather import gather_rows
from cantata.core.types import Batch, StepTotals
from cantata.models.protocol import PairEncoder, PairFeatures
from cantata.train.engine import Loss
from cantata.train.metrics import Record
from cantata.train.objectives import token_sums

FOUND = "pairs_found"
"""Sum of the pairs whose text is the likest to their image, and of those the other way round, halved."""


class Contrastive:
    """Mean of two cross entropies: of an image among all texts, and of a text among all images.

    A pair is told from all that the ranks hold in one micro-batch, so the loss depends on how many these are,
    and not on how ranks share them; micro-batches that accumulate are apart. A step's loss is the mean over
    its pairs. Features travel to all ranks, and gradients back to where they came from.

    Args:
        model: what is trained.

    Raises:
        ConfigError: a model that compares no pairs.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PairEncoder):
            raise ConfigError(f"objective=contrastive: {type(model).__name__} compares no images with texts")

    def __call__(self, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
        features: PairFeatures = model(batch)
        count = len(features.image_ID)
        if len(features.text_SD) != count or batch.num_targets != count:
            raise RunError(f"{count} images for {len(features.text_SD)} texts; batch: {batch.describe()}")
        loss_n, found = pair_losses(features)
        value = loss_n.sum() / totals.target_weight
        sums = {"loss_sum": loss_n.detach().sum(), **token_sums(loss_n.detach(), batch), FOUND: found}
        return Loss(value, sums)

    def measured(self, sums: Mapping[str, Tensor]) -> Record:
        """`eval/retrieval`: share of held-out pairs that are found among those of their micro-batch."""
        pairs = sums["targets_M"].sum().item()
        return {"eval/retrieval": sums[FOUND].item() / pairs if pairs else None}


def pair_losses(features: PairFeatures) -> tuple[Tensor, Tensor]:
    """Each of this rank's pairs' loss, (n,), fp32, and how many are found: see `FOUND`; a collective."""
    count, width = features.image_ID.shape
    rows_N2D, start = gather_rows(torch.cat((features.image_ID, features.text_SD), dim=1))
    own_n = torch.arange(start, start + count, device=rows_N2D.device)
    to_texts_nN = features.scale * features.image_ID @ rows_N2D[:, width:].t()
    to_images_nN = features.scale * features.text_SD @ rows_N2D[:, :width].t()
    losses = [F.cross_entropy(x, own_n, reduction="none") for x in (to_texts_nN, to_images_nN)]
    found = [
        (x.argmax(1) == own_n).sum() if count else own_n.sum() for x in (to_texts_nN.detach(), to_images_nN)
    ]
    return (losses[0] + losses[1]) / 2, (found[0] + found[1]) / 2
