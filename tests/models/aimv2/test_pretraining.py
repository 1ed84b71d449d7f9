"""AIMv2 in pretraining: who sees what, packed as separate, and what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.core.types import Batch, Images, Segments
from cantata.data.collate import PrefixCollator
from cantata.models.aimv2 import Aimv2Pretraining
from cantata.models.protocol import Decodes, EmbedsTokens, LanguageModel, PatchPredictor
from cantata.train.autoregression import MultimodalAutoregression
from tests.models.aimv2.small import (
    DECODER,
    KINDS,
    NATIVE,
    VISION,
    documents,
    encoder,
    images_of,
    pair_processor,
    patch_batch,
    pretraining,
    processor,
    random_pixels,
    totals_of,
)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(kind: str) -> None:
    vision = KINDS[kind]
    model, objective = pretraining(vision), None
    objective = MultimodalAutoregression(model, 0.4, 1.0)
    packed = patch_batch(4, vision, padding=5)
    parts = [patch_batch(1, vision, first=i) for i in range(4)]
    assert packed.images.prefix == Segments.concatenate(part.images.prefix for part in parts)
    together = objective(model, packed, totals_of(packed))
    together.value.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [objective(model, part, totals_of(packed)) for part in parts]
    sum(loss.value for loss in alone).backward()
    assert together.value.item() == pytest.approx(sum(loss.value.item() for loss in alone), rel=2e-6)
    for name, parameter in model.named_parameters():
        scale = max(1e-3, float(parameter.grad.abs().max()))
        assert float((gradients[name] - parameter.grad).abs().max()) <= 5e-6 * scale, name


@given(st.data())
@settings(max_examples=25)
def test_what_a_patch_can_tell(data: st.DataObject) -> None:
    """A changed patch changes just the features that may see it, and predictions of later patches alone."""
    prefix, changed = data.draw(st.integers(1, 16)), data.draw(st.integers(0, 15))
    model = MODEL
    images = replace(images_of(random_pixels((16, 16)), VISION), prefix=Segments((prefix,)))
    patches = images.patches_PC.clone()
    patches[changed] += 1.0
    with torch.no_grad():
        before, after = model.vision(images), model.vision(replace(images, patches_PC=patches))
        moved = ((before - after).abs().amax(1) > 0).tolist()
        assert moved == [changed < prefix if i < prefix else changed <= i for i in range(16)]
        ids = torch.full((16,), 9)
        predictions = [
            model(decoder_batch(ids, replace(images, patches_PC=p))).predicted_RC
            for p in (images.patches_PC, patches)
        ]
    assert len(predictions[0]) == 16 - prefix
    differs = ((predictions[0] - predictions[1]).abs().amax(1) > 0).tolist()
    assert differs == [changed < i for i in range(prefix, 16)]


def decoder_batch(ids_T: Tensor, images: Images) -> Batch:
    count = len(ids_T)
    index = torch.tensor([count - 1])
    return Batch(
        input_ids_T=ids_T,
        labels_T=torch.full_like(ids_T, 5),
        position_ids_T=torch.arange(count),
        modality_ids_T=torch.ones_like(ids_T),
        target_index_N=index,
        target_modality_N=torch.ones_like(index),
        samples=Segments((count,)),
        images=replace(images, token_index_Q=torch.arange(count), features=images.patches),
    )


MODEL = pretraining()


def test_a_whole_prefix_is_the_published_encoder() -> None:
    """What is evaluated, with every patch seeing all, is what a prefix of all patches is in training."""
    images = images_of(random_pixels((16, 16), (16, 16)), VISION)
    published = encoder(VISION)
    published.load_state_dict(
        {name: value for name, value in MODEL.state_dict().items() if name.startswith("vision.")}
    )
    with torch.no_grad():
        whole = MODEL.vision(replace(images, prefix=images.patches))
        torch.testing.assert_close(whole, published(images), rtol=1e-5, atol=1e-5)


def test_text_without_images_and_images_of_one_patch() -> None:
    model = pretraining(NATIVE)
    objective = MultimodalAutoregression(model, 0.4, 1.0)
    collator = PrefixCollator(processor(NATIVE))
    only_text = replace(documents(1)[0], parts=("no picture here",))
    tiny = replace(documents(1)[0], parts=(documents(1)[0].parts[0].resize((4, 4)), "dot"))
    for example in (only_text, tiny):
        sample = collator.encode(example, "s:0")
        batch = collator.collate([collator.row([sample])], len(sample) + 2)
        loss = objective(model, batch, totals_of(batch))
        loss.value.backward()
        assert math.isfinite(loss.value.item())
        assert loss.sums["parts/patches"] == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_it_says_of_itself() -> None:
    for kind in (LanguageModel, Decodes, EmbedsTokens, PatchPredictor):
        assert isinstance(MODEL, kind)
    held = [f"{unit.name}.{name}" for unit in MODEL.units() for name, _ in unit.module.named_parameters()]
    assert len(held) == len(set(held))
    root = {"vision.rms_norm.weight", "decoder.connector.weight"}
    assert set(held) | root == {name for name, _ in MODEL.named_parameters()}
    assert [unit.name for unit in MODEL.units() if unit.is_block] == [
        f"{part}.layers.{i}" for part in ("vision", "decoder") for i in range(2)
    ]
    layer = 24 * (4 * 24 + 3 * 40)
    assert MODEL.flops_per_token(10.0) == 6 * (2 * layer + 24 * 6144) + 6 * 2 * 24 * 10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2, "max_patches": 64}, "patch_size gives 12; the model needs 48"),
        ({"image_size": 32, "max_patches": 64}, "image_size gives 8; the model needs 4"),
        ({"is_native": True}, "is_native gives True; the model needs False"),
        ({"image_token_id": 6144}, "has 6145 tokens, more than model.decoder.vocab_size=6144"),
    ],
)
def test_a_processor_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    MODEL.check_processor(processor())
    with pytest.raises(ConfigError, match=message):
        MODEL.check_processor(processor(**change))
    with pytest.raises(ConfigError, match="set collator=aimv2_224"):
        MODEL.check_processor(pair_processor())


def test_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_head=true"):
        Aimv2Pretraining(replace(VISION, use_head=True), DECODER)


def test_bf16_is_near_fp32() -> None:
    model, batch = pretraining(), patch_batch(4, VISION, padding=3)
    objective = MultimodalAutoregression(model, 0.4, 1.0)
    exact = objective(model, batch, totals_of(batch)).value
    rounded = objective(model.bfloat16(), batch, totals_of(batch)).value
    rounded.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())
