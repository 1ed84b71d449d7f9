"""Mllama as one: packing, padding, masking, initial values, what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import Sample
from cantata.core.types import IMAGE, VIDEO, Batch, ModelOutput
from cantata.models.mllama import Masking, Mllama
from cantata.models.protocol import Decodes, EmbedsTokens, LanguageModel
from tests.data.helpers import mini_processor
from tests.models.mllama.mixed import KINDS, collator, encoded, mixed_batch, mixed_layout, mixed_mllama
from tests.models.mllama.small import small_layout, small_mllama, small_processor

GRADIENT_BOUND = 3e-6
"""Of gradients: norms and softmaxes take differences of what was rounded already."""


@cache
def reader(masking: Masking) -> Mllama:
    model = mixed_mllama(masking)
    model.check_processor(collator().processor)
    return model


def run(model: Mllama, batch: Batch) -> tuple[ModelOutput, dict[str, Tensor]]:
    model.zero_grad()
    output = model(batch, with_logits=True)
    output.loss_sum.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    """1e-6 of the largest value: sums run in another order."""
    found, expected = found.detach(), expected.detach()
    scale = max(1e-3, scale, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("masking", Masking)
@pytest.mark.parametrize("kind", [*KINDS, "two images, then none"])
def test_packed_equals_separate(kind: str, masking: Masking) -> None:
    """Two rows of several samples and a tail of padding, against every sample in a batch of its own."""
    model = reader(masking)
    samples = [encoded("several images")[1], encoded("text")[0]] if kind not in KINDS else encoded(kind)
    if kind not in KINDS:
        assert [len(sample.images) for sample in samples] == [3, 0]
    batch = mixed_batch(samples[:-1], samples[-1:], padding=3)
    packed, gradients = run(model, batch)
    parts = [run(model, mixed_batch([sample])) for sample in samples]
    assert packed.logits_TV is not None
    assert_same(packed.logits_TV[: batch.num_tokens], torch.cat([out.logits_TV for out, _ in parts]))
    assert_same(packed.loss_N, torch.cat([out.loss_N for out, _ in parts]))
    assert_same(packed.loss_sum, sum(out.loss_sum for out, _ in parts))
    assert len(gradients) == len(list(model.parameters()))
    for name, gradient in gradients.items():
        # Sums over tokens and samples of either sign, in another order: 1e-6 of what is summed.
        scale = sum(float(grads[name].abs().max()) for _, grads in parts)
        separate = sum(grads[name] for _, grads in parts)
        assert float((gradient - separate).abs().max()) <= GRADIENT_BOUND * scale + 1e-9, name


def test_the_samples_are_of_every_kind() -> None:
    batch = mixed_batch(encoded("everything"))
    assert {IMAGE, VIDEO} <= set(batch.modality_ids_T.tolist())
    tiles = {length // 4 for length in batch.images.patches.lengths}
    assert len(tiles) > 1
    assert {len(sample.images) for sample in encoded("everything")} >= {0, 1, 3}


def other_image(sample: Sample) -> Sample:
    """The same sample, the pixels of its last image inverted."""
    *others, last = sample.images
    return replace(sample, images=(*others, last._replace(patches_PC=255 - last.patches_PC)))


@pytest.mark.parametrize("masking", Masking)
def test_tokens_before_an_image_do_not_see_it_unless_transformers_masking_is_asked_for(
    masking: Masking,
) -> None:
    sample = encoded("video")[0]
    before = int((sample.input_ids_T == 9).argmax())
    assert before > 2
    model = reader(masking)
    with torch.no_grad():
        first, second = (
            model(mixed_batch([one]), with_logits=True).logits_TV for one in (sample, other_image(sample))
        )
    changed_T = (first - second).abs().amax(1) > 0
    assert changed_T[-1]
    assert changed_T[:before].any() == (masking is Masking.transformers)


def test_text_between_images_reads_the_one_before_it() -> None:
    """With Meta's masking a later image changes nothing before it either."""
    sample = encoded("several images")[0]
    places = (sample.input_ids_T == 9).nonzero()[0]
    assert len(places) == 3
    model = reader(Masking.meta)
    with torch.no_grad():
        first, second = (
            model(mixed_batch([one]), with_logits=True).logits_TV for one in (sample, other_image(sample))
        )
    changed_T = (first - second).abs().amax(1) > 0
    assert not changed_T[: places[2]].any()
    assert changed_T[places[2] :].all()


def test_padded_equals_alone() -> None:
    model, samples = reader(Masking.meta), encoded("everything")
    alone, gradients = run(model, mixed_batch(samples))
    padded, padded_gradients = run(model, mixed_batch(samples, padding=40))
    assert_same(padded.logits_TV[: alone.logits_TV.shape[0]], alone.logits_TV)
    assert_same(padded.loss_sum, alone.loss_sum)
    for name, gradient in gradients.items():
        assert_same(padded_gradients[name], gradient)


def test_a_batch_of_text_gives_every_parameter_a_gradient() -> None:
    """Zeros where only images reach, so that ranks with and without images reduce the same."""
    model = reader(Masking.meta)
    _, gradients = run(model, mixed_batch(encoded("text")))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    reached = {name for name, gradient in gradients.items() if gradient.any()}
    images = ("vision.", "projector.", "text.layers.1.", "text.layers.3.")
    assert reached == {name for name in gradients if not name.startswith(images)}


def test_labels_never_hold_the_image_token() -> None:
    for kind in KINDS:
        assert not (mixed_batch(encoded(kind)).labels_T == 9).any()


def test_new_cross_layers_leave_a_language_model_as_it_was() -> None:
    """Gates begin at 0: logits do not depend on images at all, and the gates are the first to learn."""
    model = small_mllama(mixed_layout(), perturb=False)
    sample = encoded("video")[0]
    first, gradients = run(model, mixed_batch([sample]))
    second, _ = run(model, mixed_batch([other_image(sample)]))
    assert torch.equal(first.logits_TV, second.logits_TV)
    assert gradients["text.layers.1.cross_attn_attn_gate"].any()
    assert not gradients["projector.weight"].any()


def test_initial_values() -> None:
    model = small_mllama(mixed_layout(), perturb=False)
    values = dict(model.named_parameters())
    assert values["vision.layers.0.input_layernorm.weight"].eq(1).all()
    assert values["vision.embeddings.layernorm.bias"].eq(0).all()
    assert values["text.layers.1.cross_attn.q_norm.weight"].eq(1).all()
    assert values["vision.global_layers.1.gate_ffn"].item() == pytest.approx(math.pi / 4)
    gates = [name for name in values if name.endswith("gate")]
    assert len(gates) == 7
    assert all(values[name].eq(0).all() for name in gates)
    assert 0.15 < values["vision.embeddings.canvas_position.weight"].std() < 0.25
    opened = dict(small_mllama(small_layout(initial_gate=1.0), perturb=False).named_parameters())
    moved = {name for name in gates if opened[name].eq(1).all()}
    assert moved == {name for name in gates if name.startswith("text.")}
    assert len(moved) == 4


def test_what_it_says_of_itself() -> None:
    for layout in (mixed_layout(), small_layout(None)):
        model = Mllama(*layout)
        assert isinstance(model, LanguageModel)
        assert isinstance(model, Decodes)
        assert isinstance(model, EmbedsTokens)
        held = {id(p) for unit in model.units() for p in unit.module.parameters()}
        assert held == {id(p) for p in model.parameters()}
        assert model.moe_layers() == ()


def test_flops_are_six_for_each_weight_that_a_token_meets() -> None:
    model = Mllama(*mixed_layout())
    names = ("embed_tokens", "cross_attn.k_proj", "cross_attn.v_proj")
    met = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(("text.", "head.")) and p.dim() > 1 and not any(part in name for part in names)
    )
    assert model.flops_per_token(0) == 6 * met
    # Three layers attend to the text, with 4 heads of 8: queries by keys and weights by values, half of them.
    assert model.flops_per_token(10) - model.flops_per_token(0) == 6 * 3 * 32 * 10


def test_text_alone_freezes_what_reads_images_and_takes_none() -> None:
    model = small_mllama(mixed_layout()._replace(vision=None))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("text.layers.1.", "text.layers.3.")) for name in frozen)
    with pytest.raises(RunError, match="7 images, and the model has no vision tower"):
        model(mixed_batch(encoded("video")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token": "<|reserved_10|>"}, r"image_token gives 10; the model needs 9"),
        ({"patch_size": 8}, r"patch_size gives 192; the model needs 48"),
        ({"image_size": 16}, r"image_size gives 16; the model needs 8"),
        ({"max_num_tiles": 2}, r"max_num_tiles gives 2; the model needs 4"),
    ],
)
def test_a_processor_of_other_sizes_is_refused(changes: dict[str, int | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader(Masking.meta).check_processor(small_processor(**changes))


def test_another_familys_processor_is_refused() -> None:
    with pytest.raises(ConfigError, match="AriaProcessor, which makes no tiles; set collator=mllama"):
        reader(Masking.meta).check_processor(mini_processor(image_size=8, min_image_size=4, patch_size=4))


def test_a_larger_vocabulary_is_refused_but_for_the_image_token() -> None:
    layout, size = mixed_layout(), small_processor().vocab_size
    small = replace(layout.text, vocab_size=size - 1)
    with pytest.raises(ConfigError, match=f"has {size} tokens, more than"):
        Mllama(layout.vision, small, 9).check_processor(small_processor())


def test_an_image_token_without_a_row_is_refused() -> None:
    layout = small_layout()
    with pytest.raises(ConfigError, match=r"image_token_id=72.*up to 71"):
        Mllama(layout.vision, layout.text, 72)
