"""Aria as one: packing, padding, images, initial values, what it says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cantata.core.types import IMAGE, TEXT, VIDEO, Batch, ModelOutput
from cantata.models.aria import Aria
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.models.protocol import LanguageModel
from cantata.nn.lora import Packing
from cantata.nn.moe.balance import balance_loss
from cantata.tools.verify import Sample, pack, synthetic_samples
from tests.models.aria.mixed import SAMPLES, collator, encoded, mixed_batch, mixed_layout
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance

LAYOUT = small_layout(moe={"balance": balance(4, aux=0.1, z=0.01)})


def run(model: Aria, samples: list[Sample], padding: int = 0) -> tuple[ModelOutput, dict[str, Tensor]]:
    """One packed batch: its output, and the gradients of its loss sum."""
    return run_batch(model, pack(samples, LAYOUT, padding))


def run_batch(model: Aria, batch: Batch) -> tuple[ModelOutput, dict[str, Tensor]]:
    model.zero_grad()
    output = model(batch, with_logits=True)
    output.loss_sum.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """1e-6 of the largest value: sums run in another order."""
    found, expected = found.detach(), expected.detach()
    scale = max(1e-3, float(expected.abs().max()))
    # Kernels sum segments of other lengths in other orders: 3e-7 on an Intel Xeon, 1.3e-6 on an AMD EPYC.
    assert float((found - expected).abs().max()) <= 2e-6 * scale


@pytest.fixture(scope="module")
def reader() -> Aria:
    """Reads what the real processor makes."""
    model = small_aria(mixed_layout(moe={"balance": LAYOUT.text.moe.balance}))
    model.check_processor(collator().processor)
    return model


@pytest.mark.parametrize("kind", SAMPLES)
def test_packed_equals_separate(kind: str, reader: Aria) -> None:
    """Two rows of several samples and a tail of padding, against every sample in a batch of its own."""
    samples = encoded(kind)
    batches = [mixed_batch([sample]) for sample in samples]
    batch = mixed_batch(samples[:-1], samples[-1:], padding=3)
    packed, gradients = run_batch(reader, batch)
    parts = [run_batch(reader, alone) for alone in batches]
    assert packed.logits_TV is not None
    logits_TV = packed.logits_TV[: batch.num_tokens]
    assert_same(logits_TV, torch.cat([output.logits_TV for output, _ in parts]))
    assert_same(packed.loss_N, torch.cat([output.loss_N for output, _ in parts]))
    assert_same(packed.loss_sum, sum(output.loss_sum for output, _ in parts))
    counts = sum(output.router.tokens_per_expert_ME for output, _ in parts)
    assert torch.equal(packed.router.tokens_per_expert_ME, counts)
    for name, gradient in gradients.items():
        separate = sum(grads[name] for _, grads in parts)
        # A key's bias moves all scores of a query alike: its gradient is rounding only.
        wide = name.replace("k_proj.bias", "q_proj.bias")
        scale = sum(grads[wide].abs().max() for _, grads in parts)
        # Norms and softmaxes take differences of what was rounded already, and the patches' bias sums over
        # all patches of seven crops, of either sign: 1.3e-6 on the Xeon, 3.8e-6 on the EPYC.
        assert float((gradient - separate).abs().max()) <= 5e-6 * scale, name


def test_the_samples_are_of_every_kind() -> None:
    batch = mixed_batch(encoded("everything"))
    assert set(batch.modality_ids_T.tolist()) == {TEXT, IMAGE, VIDEO}
    assert set(batch.images.features.lengths) == {2, 5}
    assert {len(sample.images) for sample in encoded("everything")} >= {0, 1, 3, 4}
    assert len(set(batch.images.patches.lengths)) > 3
    assert batch.target_weight_N is not None
    assert set(batch.target_weight_N.tolist()) == {0.5, 1.0}


def test_order_and_company_do_not_matter() -> None:
    model, samples = small_aria(LAYOUT), synthetic_samples(LAYOUT, 0)
    forward, _ = run(model, samples)
    backward, _ = run(model, samples[::-1])
    pieces = backward.logits_TV.split([len(sample.input_ids) for sample in samples[::-1]])
    assert_same(torch.cat(pieces[::-1]), forward.logits_TV)


@pytest.mark.parametrize("padding", [1, 40])
def test_padded_equals_alone(padding: int) -> None:
    model, samples = small_aria(LAYOUT), synthetic_samples(LAYOUT, 0)
    alone, gradients = run(model, samples)
    padded, padded_gradients = run(model, samples, padding)
    assert_same(padded.logits_TV[:-padding], alone.logits_TV)
    assert_same(padded.loss_sum, alone.loss_sum)
    for name in ("mass_ME", "z_sum", "sequence_sum"):
        assert_same(getattr(padded.router, name), getattr(alone.router, name))
    assert torch.equal(padded.router.tokens_per_expert_ME, alone.router.tokens_per_expert_ME)
    for name, gradient in gradients.items():
        assert_same(padded_gradients[name], gradient)


def test_padding_never_reaches_the_router_losses() -> None:
    model, samples = small_aria(LAYOUT), synthetic_samples(LAYOUT, 0)
    gradients = []
    for padding in (0, 9):
        stats = model(pack(samples, LAYOUT, padding)).router
        loss = balance_loss(stats, stats.tokens_per_expert_ME, model.balance).loss_sum
        gradients.append(torch.autograd.grad(loss, model.text.embed_tokens.weight)[0])
    assert_same(*gradients)


def test_a_batch_without_images_still_trains_the_tower_by_zero() -> None:
    model = small_aria(LAYOUT)
    _, gradients = run(model, synthetic_samples(LAYOUT, 0)[:1], padding=3)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert name in gradients, name
        if name.startswith(("vision.", "projector.")):
            assert gradients[name].count_nonzero() == 0, name


def test_nothing_but_padding_runs() -> None:
    model = small_aria(LAYOUT)
    empty = Sample([], 0, [])
    output, gradients = run(model, [empty], padding=4)
    assert output.loss_sum.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


def test_features_follow_their_image() -> None:
    """Changing one image changes only the features, and the later tokens, of its own sample."""
    model, samples = small_aria(LAYOUT), synthetic_samples(LAYOUT, 0)
    before = model(pack(samples, LAYOUT), with_logits=True).logits_TV
    changed = samples[1]._replace(images=[samples[1].images[0], samples[1].images[1] + 1])
    after = model(pack([samples[0], changed, samples[2]], LAYOUT), with_logits=True).logits_TV
    first, last = len(samples[0].input_ids), len(samples[0].input_ids) + len(samples[1].input_ids)
    placeholders = [i for i, token in enumerate(samples[1].input_ids) if token == LAYOUT.image_token_id]
    second_image = first + placeholders[len(placeholders) // 2]
    moved = (before != after).any(-1)
    assert not moved[:second_image].any()
    assert moved[second_image:last].all()
    assert not moved[last:].any()


def test_bytes_equal_normalised_floats() -> None:
    model = small_aria(LAYOUT)
    batch = pack(synthetic_samples(LAYOUT, 0), LAYOUT)
    pixels = torch.randint(256, batch.images.patches_PC.shape, dtype=torch.uint8)
    outputs = []
    for patches in (pixels, (pixels.float() / 255 - 0.5) / 0.5):
        outputs.append(model(replace(batch, images=replace(batch.images, patches_PC=patches))).loss_N)
    assert_same(*outputs)


def test_without_logits_the_loss_is_the_same() -> None:
    model, batch = small_aria(LAYOUT), pack(synthetic_samples(LAYOUT, 0), LAYOUT, 5)
    with_logits, without = model(batch, with_logits=True), model(batch)
    assert without.logits_TV is None
    assert_same(without.loss_N, with_logits.loss_N)


def test_bf16_is_near_fp32() -> None:
    model, batch = small_aria(LAYOUT, perturb=False), pack(synthetic_samples(LAYOUT, 0), LAYOUT, 5)
    exact = model(batch).loss_sum
    rounded = model.bfloat16()(batch)
    rounded.loss_sum.backward()
    assert rounded.loss_sum.dtype == torch.float32
    torch.testing.assert_close(rounded.loss_sum, exact, rtol=0.03, atol=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in trained)
    assert all(p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("tied", [False, True])
def test_units_hold_every_trained_parameter_once(tied: bool) -> None:
    model = small_aria(small_layout(tie_word_embeddings=tied))
    assert isinstance(model, LanguageModel)
    held = [f"{unit.name}.{name}" for unit in model.units() for name, _ in unit.module.named_parameters()]
    assert len(held) == len(set(held))
    root = {"vision.post_layernorm.weight", "vision.post_layernorm.bias"} | (
        {"text.embed_tokens.weight"} if tied else set()
    )
    assert set(held) | root == {name for name, _ in model.named_parameters()}
    assert [unit.name for unit in model.units() if unit.is_block] == [
        f"{part}.layers.{i}" for part in ("vision", "text") for i in range(2)
    ]
    assert all(model.get_submodule(unit.name) is unit.module for unit in model.units())


def test_moe_layers_are_in_the_order_of_the_stats() -> None:
    model = small_aria(LAYOUT)
    assert [layer is block.mlp for layer, block in zip(model.moe_layers(), model.text.layers, strict=True)]
    with torch.no_grad():
        model.moe_layers()[1].router.weight.zero_()
    router = model(pack(synthetic_samples(LAYOUT, 0), LAYOUT)).router
    assert router.tokens_per_expert_ME.shape == (2, 3, 4)
    assert router.mass_ME[1].sum(0).std().item() == pytest.approx(0.0, abs=1e-5)
    assert router.mass_ME[0].sum(0).std().item() > 1e-3


def test_meta_build_and_initial_values() -> None:
    layout = small_layout(moe={"balance": balance(4, bias=0.01)}, hidden_size=64, vocab_size=512)
    with torch.device("meta"):
        meta = Aria(*layout)
    assert all(p.is_meta for p in meta.parameters())
    model, again = (small_aria(layout, perturb=False) for _ in range(2))
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        if name.endswith(("bias", "expert_bias_E")):
            assert tensor.count_nonzero() == 0, name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert float(tensor.std()) == pytest.approx(0.2, rel=0.15), name
            assert abs(float(tensor.mean())) < 0.05, name


def test_flops_count_every_product() -> None:
    layout = small_layout()
    text, moe = layout.text, layout.text.moe
    per_layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 24 * (moe.top_k + moe.num_shared_experts) + 32 * 4
    weights, attention = 2 * per_layer + 32 * 64, 6 * 2 * 32 * 10.0
    model = Aria(*layout)
    assert model.flops_per_token(10.0) == 6 * weights + attention
    apply_lora(model, LoRAConfig(2, 4, 0.0, False, False, ["head"], {}, [], None, Packing.none))
    assert model.flops_per_token(10.0) == 4 * weights + attention, "frozen weights get no gradients"
    assert text.num_hidden_layers == 2
