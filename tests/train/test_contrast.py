"""The contrastive loss against a loop over pairs."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError, RunError
from cantata.core.types import Batch, Segments, StepTotals
from cantata.models.aimv2 import Aimv2Contrastive
from cantata.models.protocol import LanguageModel, PairEncoder, Trainable
from cantata.train.autoregression import MultimodalAutoregression
from cantata.train.contrast import FOUND, Contrastive
from cantata.train.objectives import NextTokenOf
from tests.models.aimv2.small import NATIVE, TEXT, VISION, contrastive, pair_batch, pair_processor, processor

KINDS = {"fixed": VISION, "native": NATIVE}


def totals_of(batch: Batch) -> StepTotals:
    return StepTotals(batch.num_tokens, batch.num_targets, batch.target_weight)


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


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_company(kind: str) -> None:
    model, whole = contrastive(KINDS[kind]), pair_batch(4, KINDS[kind])
    with torch.no_grad():
        together = model(whole)
        alone = [model(pair_batch(1, KINDS[kind], seed=0))]
    torch.testing.assert_close(together.image_ID[:1], alone[0].image_ID, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.text_SD[:1], alone[0].text_SD, rtol=1e-5, atol=1e-6)
    for features in (together.image_ID, together.text_SD):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4), rtol=1e-6, atol=0)


def test_a_text_reads_forward_and_ends_at_its_end() -> None:
    """Changing a token changes the text's feature; tokens after its end would be another text's."""
    model, batch = contrastive(), pair_batch(2)
    ids = batch.input_ids_T.clone()
    ids[batch.samples.total :] = 17
    with torch.no_grad():
        same = model(replace(batch, input_ids_T=ids)).text_SD
        assert torch.equal(same, model(batch).text_SD)
        ids[1] += 1
        changed = model(replace(batch, input_ids_T=ids)).text_SD
    assert not torch.equal(changed[0], same[0])
    assert torch.equal(changed[1], same[1])


def test_the_scale_is_limited() -> None:
    model = contrastive()
    with torch.no_grad():
        model.init_parameter("logit_scale", model.logit_scale, torch.Generator())
        assert model.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
        model.logit_scale.fill_(math.log(1000))
    assert model.scale().item() == 100.0


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


def test_what_it_says_of_itself() -> None:
    model = contrastive()
    for kind in (Trainable, LanguageModel, PairEncoder):
        assert isinstance(model, kind)
    held = [f"{unit.name}.{name}" for unit in model.units() for name, _ in unit.module.named_parameters()]
    assert len(held) == len(set(held))
    rest = {name for name, _ in model.named_parameters()} - set(held)
    assert {name.partition(".")[0] for name in rest} == {
        *("vision", "text", "visual_projection", "text_projection", "logit_scale"),
    }
    assert all(".layers." not in name for name in rest)
    assert model.flops_per_token(8.0) == 6 * 2 * 24 * (4 * 24 + 3 * 40) + 6 * 2 * 24 * 8.0


@pytest.mark.parametrize("objective", [NextTokenOf, lambda model: MultimodalAutoregression(model, 0.4, 1.0)])
def test_other_objectives_refuse_it(objective: Any) -> None:
    with pytest.raises(ConfigError, match="Aimv2Contrastive predicts no"):
        objective(contrastive())
    with pytest.raises(ConfigError, match="objective=contrastive: Linear compares no images"):
        Contrastive(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 30}, "max_length gives 30, more than model.text.max_position_embeddings=20"),
        ({"text_end": "<|im_end|>"}, "text_end is token"),
        ({"patch_size": 2, "max_patches": 64}, "patch_size gives 12"),
    ],
)
def test_a_processor_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    model = contrastive()
    model.check_processor(pair_processor())
    with pytest.raises(ConfigError, match=re.escape(message)):
        model.check_processor(pair_processor(**change))
    with pytest.raises(ConfigError, match="set collator=aimv2_pairs"):
        model.check_processor(processor())


def test_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="use_head=false"):
        Aimv2Contrastive(VISION, TEXT, 12, 100.0)
    with pytest.raises(ConfigError, match="are both given"):
        Aimv2Contrastive(replace(VISION, use_head=True), TEXT, 12, 100.0, "a", "b")
