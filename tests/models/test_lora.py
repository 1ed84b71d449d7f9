"""Which targets get adapters, by pattern; what is frozen, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.lora import LoRAConfig, Matched, apply_lora, base_names, matched, targets
from cantata.nn.head import LanguageHead
from cantata.nn.lora import Packing, is_factor
from cantata.nn.matmul import Linear
from cantata.nn.moe.experts import Experts

CONFIG = LoRAConfig(
    r=2,
    alpha=4,
    dropout=0.0,
    rslora=False,
    dora=False,
    targets=["layers.*", "head"],
    ranks={},
    modules_to_save=[],
    adapter=None,
    quantize_base=Packing.none,
)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.experts = Experts(3, 6, 4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = LanguageHead(6, 10, 1e-6, tied=False)


@pytest.fixture
def model() -> nn.Module:
    with torch.device("meta"):
        return Small()


def factors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if is_factor(name)}


def test_every_linear_layer_embedding_head_and_expert_matrix_is_a_target(model: nn.Module) -> None:
    layers = [f"layers.{i}.{part}" for i in (0, 1) for part in ("proj", "experts.fc1", "experts.fc2")]
    assert list(targets(model)) == ["embed", *layers, "head"]


def test_names_stay_and_all_else_is_frozen(model: nn.Module) -> None:
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    apply_lora(model, CONFIG)
    after = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: shape for name, shape in after.items() if not is_factor(name)} == own
    assert base_names(model) == own.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == factors(model).keys()
    assert factors(model) == {
        **{f"layers.{i}.proj.lora_A": (2, 6) for i in (0, 1)},
        **{f"layers.{i}.proj.lora_B": (6, 2) for i in (0, 1)},
        **{f"layers.{i}.experts.fc1_lora_A": (3, 6, 2) for i in (0, 1)},
        **{f"layers.{i}.experts.fc1_lora_B": (3, 2, 8) for i in (0, 1)},
        **{f"layers.{i}.experts.fc2_lora_A": (3, 4, 2) for i in (0, 1)},
        **{f"layers.{i}.experts.fc2_lora_B": (3, 2, 6) for i in (0, 1)},
        "head.lora_A": (2, 6),
        "head.lora_B": (10, 2),
    }


def test_what_each_pattern_matched_is_counted_once(model: nn.Module) -> None:
    apply_lora(model, replace(CONFIG, targets=["layers.0.*", "layers.*", "head"]))
    layer = 2 * (6 + 6) + 3 * 2 * (6 + 8) + 3 * 2 * (4 + 6)
    expected = [Matched("layers.0.*", 3, layer), Matched("layers.*", 3, layer), Matched("head", 1, 32)]
    assert matched(model) == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * layer + 32


def test_one_matrix_of_the_experts_alone(model: nn.Module) -> None:
    apply_lora(model, replace(CONFIG, targets=["layers.1.*.fc2"]))
    assert factors(model).keys() == {f"layers.1.experts.fc2_lora_{part}" for part in "AB"}
    assert matched(model) == [Matched("layers.1.*.fc2", 1, 3 * 2 * (4 + 6))]


def test_the_last_rank_pattern_that_matches_decides(model: nn.Module) -> None:
    apply_lora(model, replace(CONFIG, ranks={"*": 3, "*.fc1": 5}))
    found = factors(model)
    assert found["layers.0.proj.lora_A"] == (3, 6)
    assert found["layers.0.experts.fc1_lora_A"] == (3, 6, 5)
    assert found["layers.0.experts.fc2_lora_A"] == (3, 4, 3)


def test_modules_to_save_are_trained_in_full_and_no_part_of_the_base(model: nn.Module) -> None:
    apply_lora(model, replace(CONFIG, targets=["head"], modules_to_save=["layers.*.norm.*"]))
    norms = {f"layers.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == norms | {"head.lora_A", "head.lora_B"}
    assert not base_names(model) & norms


def test_dora_is_for_linear_layers(model: nn.Module) -> None:
    apply_lora(model, replace(CONFIG, dora=True, targets=["*"]))
    assert {name for name in factors(model) if "magnitude" in name} == {
        f"layers.{i}.proj.lora_magnitude" for i in (0, 1)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["layers.*", "layers.*.q_proj"]}, r"'layers\.\*\.q_proj' matches no linear layer.*proj"),
        ({"targets": ["experts.fc1"]}, r"write '\*\.experts\.fc1'"),
        ({"targets": ["layers.*.q_proj"]}, r"experts; nearest: layers\.\*\.proj$"),
        (
            {"targets": ["attention"]},
            r"known: embed, head, layers\.\*\.experts\.fc1, .*fc2, layers\.\*\.proj$",
        ),
        ({"targets": ["layers.*.norm"]}, "matches no linear layer, embedding, head or experts"),
        ({"ranks": {"*.fc3": 4}}, r"lora\.ranks: '\*\.fc3' matches no"),
        ({"modules_to_save": ["layers.*.scale"]}, "lora.modules_to_save: .* matches no parameter"),
    ],
)
def test_a_pattern_without_a_match_is_an_error(
    model: nn.Module, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_lora(model, replace(CONFIG, **changes))  # type: ignore[arg-type]
    assert not factors(model), "nothing was changed"


@pytest.mark.parametrize(
    "wrong",
    [{"r": 0}, {"ranks": {"*": 0}}, {"alpha": 0}, {"alpha": float("inf")}, {"dropout": 1.0}, {"targets": []}],
)
def test_values_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"lora\."):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]
