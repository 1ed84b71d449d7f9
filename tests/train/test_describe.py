"""What the start-up report and the closing line say is true."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.train.describe import Needs, experts, needs, origin, report, summary
from cantata.train.optim import GroupSummary
from cantata.train.stage import build_data, build_model
from cantata.train.startup import split_counts
from tests.models.aria.small import small_aria, small_layout
from tests.nn.moe.small import balance
from tests.train.test_stage import stage


def test_a_token_uses_all_but_the_experts_it_does_not_visit() -> None:
    layout = small_layout(moe={"num_experts": 8, "top_k": 3})
    found = experts(small_aria(layout))
    assert found is not None
    assert (found.layers, found.num_experts, found.top_k) == (2, 8, 3)
    one_expert = 3 * layout.text.hidden_size * layout.text.moe.expert_intermediate_size
    assert found.total_parameters - found.active_parameters == found.layers * (8 - 3) * one_expert
    without_choice = experts(
        small_aria(small_layout(moe={"num_experts": 2, "top_k": 2, "balance": balance(2)}))
    )
    assert without_choice is not None
    assert without_choice.total_parameters == without_choice.active_parameters


def test_a_dense_model_has_no_experts() -> None:
    dense: Any = SimpleNamespace(moe_layers=list)
    assert experts(dense) is None


def test_where_the_parameters_come_from() -> None:
    assert origin(stage(), None, 0) == "from scratch"
    assert origin(stage("model.weights=published"), None, 0) == "from weights published"
    assert origin(stage("model.weights=published"), None, 120) == "resumed from step-00000120"


def test_memory_is_estimated_by_rank_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = stage("train.sequence_length=128", "train.micro_batch_size=1")
    model = build_model(chosen)
    loader, _ = build_data(chosen, model)
    found = needs(chosen, model, loader)
    assert found.memory is not None
    assert found.traffic is None
    assert found.memory.total > 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(parameter.is_meta for parameter in model.parameters())
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert needs(chosen, model, loader) == Needs(found.experts, None, None)


def test_spread_experts_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    size = ("train.sequence_length=128", "train.micro_batch_size=2", "train.gradient_accumulation_steps=3")
    chosen = stage("mesh.ep=2", *size)
    model: Any = build_model(chosen)
    loader, held_out = build_data(chosen, model)
    found = needs(chosen, model, loader)
    # TINY: 2 layers, 4 experts a token (all), hidden size 32, bf16; half of the rows stay.
    assert found.traffic is not None
    assert found.traffic.bytes_each == 2 * 128 * 4 * 32 * 2 // 2
    assert found.traffic.per_step == 2 * 2 * 2 * 3
    engine: Any = SimpleNamespace(settings="made by hand", summary=[])
    told = report(chosen, "pretrain", model, engine, found, loader, held_out, 0, [])
    assert told.mesh == {"dp_replicate": 1, "dp_shard": 4, "ep": 2}
    assert told.traffic == found.traffic
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match=r"mesh\.ep=3 must divide the number of experts \(4\)"):
        needs(stage("mesh.ep=3", *size), model, loader)


def test_a_rule_that_matches_nothing_is_found_before_an_engine_is_built() -> None:
    chosen = stage("+parameters={visoin.*: {learning_rate: null, weight_decay: null, frozen: true}}")
    with pytest.raises(ConfigError, match=r"visoin"):
        needs(chosen, build_model(chosen), build_data(chosen, build_model(chosen))[0])


def test_the_report_speaks_of_this_run() -> None:
    size = ("train.gradient_accumulation_steps=3", "train.micro_batch_size=2", "train.sequence_length=256")
    shares = ("data.sources.emoji.weight=3", "data.sources.plays.weight=1")
    chosen = stage("name=trial", "out=outputs/there", *size, *shares)
    model: Any = build_model(chosen)
    loader, held_out = build_data(chosen, build_model(chosen))
    engine: Any = SimpleNamespace(settings="made by hand", summary=[GroupSummary("all", 9, 100, 0.1, 0.0)])
    found = report(
        chosen, "pretrain", model, engine, Needs(None, None, None), loader, held_out, 10, ["a note"]
    )
    assert (found.name, found.out) == ("trial", Path("outputs/there"))
    assert found.origin == "resumed from step-00000010"
    assert (split_counts(found.groups), found.notes) == ((100, 0), ["a note"])
    assert found.tokens_per_step == 3 * 2 * 256
    assert found.flops_per_step == found.tokens_per_step * model.flops_per_token(256)
    assert {row.name: row.share for row in found.sources} == {"emoji": 0.75, "plays": 0.25}
    assert [(row.name, row.share) for row in found.held_out] == [
        ("emoji (held out)", None),
        ("plays (held out)", None),
    ]


def test_the_closing_line_says_how_it_ended() -> None:
    telemetry: Any = SimpleNamespace(last_loss=2.5)
    evaluation: Any = SimpleNamespace(first_loss=8.0, last_loss=3.0)
    found = summary(stage(), "done", 12, 3.5, telemetry, evaluation)
    assert (found.outcome, found.step, found.seconds, found.loss) == ("done", 12, 3.5, 2.5)
    assert (found.held_out_before, found.held_out_after) == (8.0, 3.0)
