"""Emu3 as one: packing, padding, dropout, adapters, initial values, what it says of itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import Batch, ModelOutput
from cantata.models.emu3 import Emu3
from cantata.models.lora import apply_lora
from cantata.models.protocol import Decodes, EmbedsTokens, LanguageModel
from cantata.nn.lora import fill_factor, is_factor
from cantata.parallel.recompute import Recompute, apply_recompute
from tests.data.helpers import Letters, mini_processor
from tests.models.adapters import lora
from tests.models.emu3.small import (
    TOKENS,
    batch_of,
    reading_config,
    samples,
    small_config,
    small_emu3,
    small_processor,
)

PROCESSOR = small_processor()


@pytest.fixture(scope="module")
def model() -> Emu3:
    return small_emu3(reading_config())


def run(model: nn.Module, batch: Batch) -> tuple[ModelOutput, dict[str, Tensor]]:
    model.zero_grad()
    output = model(batch, with_logits=True)
    output.loss_sum.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """1e-6 of the largest value: sums run in another order."""
    found, expected = found.detach(), expected.detach()
    scale = max(1e-3, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("padding", [0, 5])
def test_packed_and_padded_equals_separate(model: Emu3, padding: int) -> None:
    given = samples(PROCESSOR)
    batch = batch_of(PROCESSOR, given, padding)
    packed, gradients = run(model, batch)
    parts = [run(model, batch_of(PROCESSOR, [sample])) for sample in given]
    assert packed.logits_TV is not None
    assert_same(packed.logits_TV[: batch.num_tokens], torch.cat([part.logits_TV for part, _ in parts]))
    assert_same(packed.loss_N, torch.cat([part.loss_N for part, _ in parts]))
    assert_same(packed.loss_sum, sum(part.loss_sum for part, _ in parts))
    for name, gradient in gradients.items():
        assert_same(gradient, sum(grads[name] for _, grads in parts))


def test_vision_weighs_half(model: Emu3) -> None:
    given = samples(PROCESSOR)[1:2]
    whole = [small_processor(vision_weight=1.0), small_processor(vision_weight=1.0, text_weight=0.0)]
    half = run(model, batch_of(PROCESSOR, given))[0].loss_sum
    both, vision = (
        run(model, batch_of(processor, samples(processor)[1:2]))[0].loss_sum for processor in whole
    )
    assert_same(half, both - vision / 2)


def test_dropout_is_in_training_alone(model: Emu3) -> None:
    batch = batch_of(PROCESSOR, samples(PROCESSOR), 3)
    dry = small_emu3(reading_config(dropout=0.0))
    calm = model(batch).loss_sum
    assert torch.equal(dry.train()(batch).loss_sum, calm)
    trained = copy.deepcopy(model).train()
    losses = [float(trained(batch).loss_sum.detach()) for _ in range(3)]
    assert len({*losses, float(calm.detach())}) == 4
    assert torch.equal(trained.eval()(batch).loss_sum, calm)


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
def test_what_is_recomputed_drops_the_same(model: Emu3, mode: Recompute) -> None:
    batch = batch_of(PROCESSOR, samples(PROCESSOR))
    results = []
    for recompute in (Recompute.none, mode):
        copied = copy.deepcopy(model).train()
        for unit in copied.units():
            if unit.is_block:
                apply_recompute(unit.module, recompute)
        torch.manual_seed(4)
        results.append(run(copied, batch))
    (output, gradients), (again, recomputed) = results
    assert torch.equal(again.loss_sum, output.loss_sum)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


def test_adapters_train_and_start_at_nothing(model: Emu3) -> None:
    batch = batch_of(PROCESSOR, samples(PROCESSOR))
    adapted = copy.deepcopy(model)
    patterns = ["text.layers.*", "head", "text.embed_tokens"]
    apply_lora(adapted, lora(targets=patterns))
    factors = {name: p for name, p in adapted.named_parameters() if is_factor(name)}
    assert len(factors) == 2 * (2 * 7 + 2)
    generator = torch.Generator().manual_seed(0)
    for name, factor in factors.items():
        with torch.no_grad():
            fill_factor(name.rpartition(".")[2], factor, generator, embedding="embed_tokens" in name)
    assert_same(adapted(batch).loss_sum, model(batch).loss_sum)
    with torch.no_grad():
        for factor in factors.values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=generator))
    output, gradients = run(adapted, batch)
    assert set(gradients) == set(factors)
    assert all(gradient.count_nonzero() for gradient in gradients.values())
    assert float((output.loss_sum - model(batch).loss_sum).detach().abs()) > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_units_hold_every_parameter_once(tied: bool) -> None:
    model = small_emu3(small_config(tie_word_embeddings=tied))
    assert isinstance(model, LanguageModel)
    assert isinstance(model, Decodes)
    assert isinstance(model, EmbedsTokens)
    held = [f"{unit.name}.{name}" for unit in model.units() for name, _ in unit.module.named_parameters()]
    assert len(held) == len(set(held))
    root = {"text.embed_tokens.weight"} if tied else set()
    assert set(held) | root == {name for name, _ in model.named_parameters()}
    assert [unit.name for unit in model.units() if unit.is_block] == ["text.layers.0", "text.layers.1"]
    assert all(model.get_submodule(unit.name) is unit.module for unit in model.units())
    assert list(model.moe_layers()) == []
    assert model.balance is None


def test_meta_build_and_initial_values() -> None:
    config = small_config(hidden_size=64, vocab_size=512)
    with torch.device("meta"):
        meta = Emu3(config)
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert list(meta.buffers()) == []
    for name, tensor in small_emu3(config, perturb=False).named_parameters():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert float(tensor.detach().std()) == pytest.approx(0.2, rel=0.1), name


def test_nothing_but_padding_runs(model: Emu3) -> None:
    output, gradients = run(model, batch_of(PROCESSOR, samples(PROCESSOR)[:0], 4))
    assert output.loss_sum.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


def test_flops_count_every_product() -> None:
    model = Emu3(small_config())
    weights = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 32 * 64
    assert weights == sum(p.numel() for n, p in model.named_parameters() if "norm" not in n) - 32 * 64
    attention = 6 * 2 * 32 * 10.0
    assert model.flops_per_token(10.0) == 6 * weights + attention
    apply_lora(model, lora(targets=["head"]))
    assert model.flops_per_token(10.0) == 4 * weights + attention, "frozen weights get no gradients"


def test_a_processor_must_fit(model: Emu3) -> None:
    model.check_processor(PROCESSOR)
    small = Emu3(reading_config(vocab_size=TOKENS.size - 1))
    with pytest.raises(ConfigError, match=r"visual_offset=6160 and .* up to 6175; .* ends at 6174"):
        small.check_processor(PROCESSOR)
    with pytest.raises(ConfigError, match=r"AriaProcessor, which cuts images into patches; .* collator=emu3"):
        model.check_processor(mini_processor())
    text = Letters()
    text.patch_values = 0
    Emu3(small_config(vocab_size=128)).check_processor(text)
    with pytest.raises(ConfigError, match=r"128 tokens, more than model\.text\.vocab_size=64"):
        Emu3(small_config()).check_processor(text)
