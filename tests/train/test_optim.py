"""Who is trained at which rate."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.models.lora import apply_lora
from cantata.nn.matmul import Linear
from cantata.train.optim import ParameterRule, describe_groups, optimizer_defaults, parameter_groups
from tests.models.test_lora import CONFIG as LORA


def build() -> nn.Module:
    return nn.ModuleDict(
        {
            "vision": nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
            "text": nn.ModuleDict({"embedding": nn.Embedding(7, 3), "output": nn.Linear(3, 7, bias=False)}),
        }
    )


def rule(rate: float | None = None, decay: float | None = None, frozen: bool = False) -> ParameterRule:
    return ParameterRule(rate, decay, frozen)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = build()
    groups = {group["name"]: group for group in parameter_groups(model, {}, 1e-3, 0.1)}
    assert set(groups) == {"default", "default (no decay)"}
    assert groups["default"]["weight_decay"] == 0.1
    assert groups["default (no decay)"]["weight_decay"] == 0.0
    assert {p.ndim for p in groups["default"]["params"]} == {2}
    assert {p.ndim for p in groups["default (no decay)"]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert (
        {group["lr"] for group in groups.values()}
        == {group["base_lr"] for group in groups.values()}
        == {1e-3}
    )


def test_the_last_match_wins() -> None:
    model = build()
    rules = {"vision.*": rule(frozen=True), "vision.1.*": rule(rate=1e-4), "text.*": rule(decay=0.0)}
    groups = {group["name"]: group for group in parameter_groups(model, rules, 1e-3, 0.1)}
    assert set(groups) == {"vision.1.* (no decay)", "text.*"}
    assert groups["vision.1.* (no decay)"]["lr"] == 1e-4
    assert (groups["text.*"]["lr"], groups["text.*"]["weight_decay"]) == (1e-3, 0.0)
    assert not model["vision"][0].weight.requires_grad
    assert model["vision"][1].weight.requires_grad


def test_what_the_model_freezes_stays_frozen() -> None:
    model = build()
    model["text"]["output"].weight.requires_grad_(False)
    groups = parameter_groups(model, {"*": rule()}, 1e-3, 0.1)
    assert not model["text"]["output"].weight.requires_grad
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("text.embeding.*", "text.embedding"), ("vison.*", "vision"), ("zzz", "text, vision")],
)
def test_an_unmatched_pattern_names_what_is_near(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"matches no parameter; (nearest|known): {near}") as caught:
        parameter_groups(build(), {pattern: rule()}, 1e-3, 0.1)
    assert "\n" not in str(caught.value)


def test_nothing_left_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        parameter_groups(build(), {"*": rule(frozen=True)}, 1e-3, 0.1)


def test_the_report_counts_everything_once() -> None:
    model = build()
    groups = parameter_groups(
        model, {"vision.*": rule(frozen=True), "text.output.*": rule(rate=5e-4)}, 1e-3, 0.1
    )
    lines = describe_groups(groups, model)
    assert [tuple(line) for line in lines] == [
        ("default", 1, 21, 1e-3, 0.1),
        ("text.output.*", 1, 21, 5e-4, 0.1),
        ("frozen", 4, 21, None, None),
    ]
    assert sum(line.parameters for line in lines) == sum(p.numel() for p in model.parameters())


def test_defaults_come_from_the_partial_or_its_signature() -> None:
    assert optimizer_defaults(partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.2)) == (3e-4, 0.2)
    assert optimizer_defaults(partial(torch.optim.AdamW, lr=3e-4)) == (3e-4, 1e-2)


def test_what_adapters_leave_frozen_is_not_trained_by_a_rate() -> None:
    model = nn.ModuleDict({"proj": Linear(3, 3), "norm": nn.LayerNorm(3)})
    apply_lora(model, replace(LORA, targets=["proj"]))
    rate = ParameterRule(1e-3, None, frozen=False)
    with pytest.raises(ConfigError, match=r"parameters.'norm.\*' matches only what adapters leave frozen"):
        parameter_groups(model, {"norm.*": rate}, 1e-4, 0.1)
    [group] = parameter_groups(model, {"norm.*": replace(rate, frozen=True), "proj.*": rate}, 1e-4, 0.1)
    assert (group["name"], group["lr"], len(group["params"])) == ("proj.*", 1e-3, 2)
