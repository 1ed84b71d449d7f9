"""The contrastive loss against a loop over pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError, RunError
from cantata.core.types import Segments, StepTotals
from cantata.train.autoregression import MultimodalAutoregression
from cantata.train.contrast import FOUND, Contrastive
from cantata.train.objectives import NextTokenOf
from tests.models.aimv2.small import NATIVE, VISION, contrastive, pair_batch, totals_of

KINDS = {"fixed": VISION, "native": NATIVE}


def slow_loss(image_ID: Tensor, text_SD: Tensor, scale: Tensor) -> tuple[Tensor, float]:
    """Pair by pair, and the pairs found."""
    losses, found, count = [], 0.0, len(image_ID)
    for i in range(count):
        to_texts = [scale * (image_ID[i] * text_SD[j]).sum() for j in range(count)]
        to_images = [scale * (image_ID[j] * text_SD[i]).sum() for j in range(count)]
        for scores in (to_texts, to_images):
            total = sum(score.exp() for score in scores)
            losses.append((total.log() - scores[i]) / 2)
            found += 0.5 * all(bool(scores[i] >= score) for score in scores)
    return sum(losses) / count, found


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_equals_the_slow_one(kind: str) -> None:
    model, batch = contrastive(KINDS[kind]), pair_batch(4, KINDS[kind])
    assert batch.target_weight == batch.num_targets == 4
    loss = Contrastive(model)(model, batch, totals_of(batch))
    loss.value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    slow, found = slow_loss(*model(batch))
    slow.backward()
    assert loss.value.item() == pytest.approx(slow.item(), rel=1e-6)
    assert loss.sums["loss_sum"].item() / 4 == pytest.approx(slow.item(), rel=1e-6)
    assert loss.sums[FOUND].item() == found
    for name, parameter in model.named_parameters():
        scale = max(1e-3, float(parameter.grad.abs().max()))
        assert float((gradients[name] - parameter.grad).abs().max()) <= 5e-6 * scale, name


def test_no_pair_is_no_loss() -> None:
    model = contrastive()
    batch = pair_batch(1)
    empty = replace(
        batch,
        samples=Segments(()),
        target_index_N=torch.empty(0, dtype=torch.int64),
        target_modality_N=torch.empty(0, dtype=torch.int64),
        target_weight_N=None,
        images=replace(
            batch.images,
            patches_PC=batch.images.patches_PC[:0],
            position_ids_P=batch.images.position_ids_P[:0],
            patches=Segments(()),
            features=Segments(()),
        ),
    )
    loss = Contrastive(model)(model, empty, StepTotals(1, 1, 1.0))
    loss.value.backward()
    assert loss.value.item() == 0
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())


def test_images_without_a_text_are_refused() -> None:
    model, batch = contrastive(), pair_batch(3)
    images = replace(batch.images, patches=Segments((16, 32)), features=Segments((0, 0)))
    with pytest.raises(RunError, match="2 images for 3 texts"):
        Contrastive(model)(model, replace(batch, images=images), totals_of(batch))


@pytest.mark.parametrize("objective", [NextTokenOf, lambda model: MultimodalAutoregression(model, 0.4, 1.0)])
def test_other_objectives_refuse_it(objective: Any) -> None:
    with pytest.raises(ConfigError, match="Aimv2Contrastive predicts no"):
        objective(contrastive())
    with pytest.raises(ConfigError, match="objective=contrastive: Linear compares no images"):
        Contrastive(torch.nn.Linear(2, 2))
