"""The objective of AIMv2's pretraining against a slow one, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import IMAGE, Batch
from cantata.data.collate import PackedCollator
from cantata.models.aimv2 import Aimv2Pretraining
from cantata.train.autoregression import MultimodalAutoregression, normalised, patch_error
from tests.models.aimv2.small import (
    NATIVE,
    VISION,
    documents,
    patch_batch,
    pretraining,
    processor,
    totals_of,
)

KINDS = {"fixed": VISION, "native": NATIVE}
MODEL = pretraining()


def slow_loss(model: Aimv2Pretraining, batch: Batch, image_weight: float, text_weight: float) -> Tensor:
    """Sample by sample, patch by patch, token by token, from logits and the pixel head's own layers."""
    assert batch.images.prefix is not None
    output = model(batch, with_logits=True)
    hidden_TD = hidden(model, batch)
    losses, patch, image, start = [], 0, 0, 0
    for length in batch.samples.lengths:
        ids = batch.input_ids_T[start : start + length]
        text, pixels = [], []
        for place in range(length - 1):
            if ids[place + 1] != 9:
                text.append(-output.logits_TV[start + place].log_softmax(-1)[ids[place + 1]])
        place = 0
        while place < length and ids[place] == 9:
            count, prefix = batch.images.patches.lengths[image], batch.images.prefix.lengths[image]
            errors = []
            for number in range(prefix, count):
                before = hidden_TD[start + place + number - 1]
                eps, weight = model.pixel_head.norm.eps, model.pixel_head.norm.weight
                normed = weight * before / (before.square().mean() + eps).sqrt()
                predicted = model.pixel_head.output.weight @ normed + model.pixel_head.output.bias
                values = output.patches_PC[patch + number]
                mean = values.sum() / len(values)
                variance = (values - mean).square().sum() / (len(values) - 1)
                errors.append(((predicted - (values - mean) / (variance + 1e-6).sqrt()) ** 2).mean())
            if errors:
                pixels.append(sum(errors) / len(errors))
            place, patch, image = place + count, patch + count, image + 1
        losses.append(text_weight * sum(text) / len(text) + image_weight * sum(pixels))
        start += length
    return sum(losses) / len(losses)


def hidden(model: Aimv2Pretraining, batch: Batch) -> Tensor:
    """What comes out of the decoder."""
    seen: list[Tensor] = []
    hook = model.decoder.layers[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    model(batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("image_weight", "text_weight"), [(0.4, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_objective_equals_the_slow_one(kind: str, image_weight: float, text_weight: float) -> None:
    model, batch = pretraining(KINDS[kind]), patch_batch(4, KINDS[kind], padding=3)
    objective = MultimodalAutoregression(model, image_weight, text_weight)
    loss = objective(model, batch, totals_of(batch))
    loss.value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    slow = slow_loss(model, batch, image_weight, text_weight)
    slow.backward()
    assert loss.value.item() == pytest.approx(slow.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        found = gradients[name]
        assert found is not None, name
        expected = torch.zeros_like(found) if parameter.grad is None else parameter.grad
        scale = max(1e-3, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= 5e-6 * scale, name
    weight = batch.target_weight
    assert weight == pytest.approx(4.0, rel=1e-6)
    assert loss.sums["loss_sum"].item() / weight == pytest.approx(slow.item(), rel=1e-6)
    assert loss.sums["loss_sum_M"].sum().item() / weight == pytest.approx(slow.item(), rel=1e-5)
    assert loss.sums["target_weight_M"].sum().item() == pytest.approx(weight)


def test_the_terms_are_told_apart() -> None:
    """An evaluation shows each without its weight; pixels count as images', whatever stands beside them."""
    batch = patch_batch(4, VISION)
    objective = MultimodalAutoregression(MODEL, 0.4, 2.0)
    with torch.no_grad():
        sums = objective(MODEL, batch, totals_of(batch)).sums
    weight = batch.target_weight
    found = objective.measured({name: value.double() for name, value in sums.items()})
    patches, tokens = found["eval/loss/patches"], found["eval/loss/tokens"]
    assert patches == pytest.approx(sums["parts/patches"].item() / weight)
    assert sums["loss_sum"].item() / weight == pytest.approx(0.4 * patches + 2.0 * tokens, rel=1e-6)
    assert sums["loss_sum_M"].sum().item() == pytest.approx(sums["loss_sum"].item(), rel=1e-6)
    assert sums["loss_sum_M"][IMAGE] >= 0.4 * sums["parts/patches"]


def test_an_image_whose_prefix_is_whole_predicts_nothing() -> None:
    batch = patch_batch(2, VISION)
    with torch.no_grad():
        batch.images.prefix = batch.images.patches
        assert patch_error(MODEL(batch), batch) == 0


def test_a_patch_is_normalised_as_mae_does() -> None:
    patches = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * 3 + 2
    found = normalised(patches)
    torch.testing.assert_close(found.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.var(1), torch.ones(5), rtol=1e-5, atol=0)
    assert normalised(torch.full((1, 48), 0.7)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("weights", "message"),
    [((-1.0, 1.0), "objective.image_weight=-1.0"), ((0.0, 0.0), "nothing would be learned")],
)
def test_weights_that_mean_nothing(weights: tuple[float, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultimodalAutoregression(MODEL, *weights)


def test_a_model_that_predicts_no_patches() -> None:
    with pytest.raises(ConfigError, match="objective=multimodal: Linear predicts no patches"):
        MultimodalAutoregression(nn.Linear(2, 2), 0.4, 1.0)


def test_pixels_without_prefixes_are_refused() -> None:
    collator = PackedCollator(processor())
    sample = collator.encode(documents(1)[0], "s:0")
    batch = collator.collate([collator.row([sample])], len(sample))
    with pytest.raises(ConfigError, match=r"set collator\._target_=cantata\.data\.collate\.PrefixCollator"):
        MultimodalAutoregression(MODEL, 0.4, 1.0)(MODEL, batch, totals_of(batch))
    captions = MultimodalAutoregression(MODEL, 0.0, 1.0)(MODEL, batch, totals_of(batch))
    assert captions.sums["parts/patches"] == 0
