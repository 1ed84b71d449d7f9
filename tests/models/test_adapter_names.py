"""PEFT's words for each kind of target, and factors into its order and back."""

from __future__ import annotations

import pytest
import torch

from cantata.models.adapter_names import (
    PREFIX,
    Target,
    adapter_targets,
    hub_parameters,
    saved_parameters,
)
from cantata.models.aria import Aria
from cantata.models.lora import apply_lora
from tests.models.adapters import lora
from tests.models.aria.small import small_layout

LAYOUT = small_layout()
DECODER = "model.language_model"
LAYER = f"{DECODER}.layers.1"


def adapted(**changes: object) -> Aria:
    with torch.device("meta"):
        model = Aria(*LAYOUT)
    apply_lora(model, lora(**changes))
    return model


def targets(**changes: object) -> dict[str, Target]:
    return {target.name: target for target in adapter_targets(adapted(**changes), LAYOUT)}


def keys(target: Target) -> dict[str, tuple[int, ...]]:
    return {stored.key.removeprefix(PREFIX): tuple(stored.shape) for stored in target.stored.values()}


def test_a_linear_layer() -> None:
    found = targets(targets=["text.layers.1.self_attn.k_proj"])
    [target] = found.values()
    assert (target.module, target.weight) == (f"{LAYER}.self_attn.k_proj", f"{target.name}.weight")
    assert (target.rank, target.is_experts, target.is_ignored, target.magnitude) == (4, False, False, None)
    assert keys(target) == {
        f"{LAYER}.self_attn.k_proj.lora_A.weight": (4, 32),
        f"{LAYER}.self_attn.k_proj.lora_B.weight": (16, 4),
    }
    assert (target.factor("A"), target.factor("B")) == (f"{target.name}.lora_A", f"{target.name}.lora_B")


def test_an_embedding_and_a_head() -> None:
    found = targets(targets=["text.embed_tokens", "head"], ranks={"head": 2})
    assert keys(found["text.embed_tokens"]) == {
        f"{DECODER}.embed_tokens.lora_embedding_A": (4, 64),
        f"{DECODER}.embed_tokens.lora_embedding_B": (32, 4),
    }
    assert found["head"].rank == 2
    assert keys(found["head"]) == {"lm_head.lora_A.weight": (2, 32), "lm_head.lora_B.weight": (64, 2)}


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_that_is_a_convolution_there(dora: bool) -> None:
    [target] = targets(targets=["vision.embeddings.patch_embedding"], dora=dora).values()
    found = {key.rpartition("patch_embedding.")[2]: shape for key, shape in keys(target).items()}
    magnitude = {"lora_magnitude_vector": (1, 32, 1, 1)} if dora else {}
    assert found == {"lora_A.weight": (4, 3, 2, 2), "lora_B.weight": (32, 4, 1, 1)} | magnitude


def test_doras_magnitudes_are_a_vector_of_a_linear_layer() -> None:
    [target] = targets(targets=["text.layers.0.self_attn.q_proj"], dora=True).values()
    assert target.magnitude == "text.layers.0.self_attn.q_proj.lora_magnitude"
    assert target.stored[target.magnitude].shape == (32,)


def test_of_both_matrices_of_experts_the_first_is_the_innermost() -> None:
    both = targets(targets=["text.layers.1.mlp.experts.*"])
    experts = f"{LAYER}.mlp.experts"
    assert keys(both["text.layers.1.mlp.experts.fc1"]) == {
        f"{experts}.base_layer.lora_A.weight": (4 * 4, 32),
        f"{experts}.base_layer.lora_B.weight": (48, 4 * 4),
    }
    assert keys(both["text.layers.1.mlp.experts.fc2"]) == {
        f"{experts}.lora_A.weight": (4 * 4, 24),
        f"{experts}.lora_B.weight": (32, 4 * 4),
    }
    assert all(target.is_experts and target.rank == 4 for target in both.values())
    [alone] = targets(targets=["text.layers.1.mlp.experts.fc1"]).values()
    assert alone.module == f"{experts}.gate_up_proj"
    assert all(".base_layer" not in key for key in keys(alone))


def test_factors_of_experts_are_laid_out_expert_by_expert_and_rank_by_rank() -> None:
    """The update of expert e, from what PEFT keeps and from what we keep."""
    [target] = targets(targets=["text.layers.0.mlp.experts.fc2"], ranks={"*.fc2": 3}).values()
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(target.stored[target.factor(letter)].native_shape, generator=generator) for letter in "AB"
    )
    kept_a, kept_b = (
        target.stored[target.factor(letter)].pack(value) for letter, value in (("A", a), ("B", b))
    )
    assert kept_a.is_contiguous()
    for expert in range(4):
        theirs = kept_b[:, expert::4] @ kept_a[3 * expert : 3 * expert + 3]
        torch.testing.assert_close(theirs, (a[expert] @ b[expert]).T, rtol=1e-6, atol=1e-6)


def test_what_is_packed_is_unpacked() -> None:
    generator = torch.Generator().manual_seed(0)
    every = targets(targets=["text.*", "head", "vision.*"], dora=True)
    kinds = [stored for target in every.values() for stored in target.stored.values()]
    assert {stored.order for stored in kinds} == {(0,), (0, 1), (0, 2, 1), (2, 1, 0)}
    for stored in kinds:
        native = torch.randn(stored.native_shape, generator=generator)
        kept = stored.pack(native)
        assert kept.shape == stored.shape
        assert torch.equal(stored.unpack(kept), native)


def test_what_peft_computes_without_is_told() -> None:
    found = targets(targets=["projector.cross_attn.*"])
    assert [name for name, target in found.items() if target.is_ignored] == ["projector.cross_attn.out_proj"]


def test_parameters_in_full_and_those_that_are_no_adapters() -> None:
    model = adapted(targets=["head"], modules_to_save=["*.router.weight", "head.norm.weight"])
    routers = [f"text.layers.{i}.mlp.router.weight" for i in (0, 1)]
    assert sorted(saved_parameters(model)) == sorted([*routers, "head.norm.weight"])
    with torch.device("meta"):
        base = Aria(*LAYOUT)
    known = list(hub_parameters(model, LAYOUT))
    assert [name for name, _, _ in known] == [name for name, _ in base.named_parameters()]
    assert ("head.weight", "lm_head.weight", torch.Size((64, 32))) in known
