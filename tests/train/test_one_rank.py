"""What one rank of many computes with."""

from __future__ import annotations

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.train.one_rank import BalancedExchange, Elements, expert_ids, on_one_rank
from tests.train.test_dry_run import build


def test_a_rank_holds_its_experts_and_the_model_stays_whole() -> None:
    model = build("meta")
    local = on_one_rank(model, 4)
    whole = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, parameter in local.named_parameters():
        of_expert = id(parameter) in expert_ids(local)
        assert of_expert == (".experts.fc" in name)
        assert parameter.numel() * (4 if of_expert else 1) == whole[name].numel()
        assert parameter.is_meta
    assert all(isinstance(layer.dispatcher, BalancedExchange) for layer in local.moe_layers())
    assert not any(isinstance(layer.dispatcher, BalancedExchange) for layer in model.moe_layers())


def test_frozen_experts_stay_frozen() -> None:
    model = build("meta")
    for layer in model.moe_layers():
        layer.experts.requires_grad_(False)
    local = on_one_rank(model, 2)
    assert not any(p.requires_grad for p in local.parameters() if id(p) in expert_ids(local))


def test_elements_know_experts() -> None:
    parameters = [torch.empty(3), torch.empty(4), torch.empty(5)]
    assert Elements.of(parameters, {id(parameters[1])}) == Elements(dense=8, experts=4)


@pytest.mark.parametrize("tokens", [8, 7, 1])
def test_as_many_rows_come_as_leave(tokens: int) -> None:
    exchange = BalancedExchange(8, 4)
    x_TD, weights_TK = torch.empty(tokens, 16, device="meta"), torch.empty(tokens, 3, device="meta")
    sent = exchange.send(x_TD, weights_TK, torch.zeros(tokens, 3, dtype=int, device="meta"))
    splits = sent.journey.splits
    assert sum(splits.leaving) == sum(splits.arriving) == tokens * 3
    assert max(splits.arriving) - min(splits.arriving) <= 1
    arrived = exchange.receive(sent)
    assert arrived.x_ND.shape == (tokens * 3, 16)
    assert arrived.tokens_per_expert_E.shape == (2,)
    assert exchange.combine(arrived.x_ND, arrived.state).shape == (tokens, 16)


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.ep=3 must divide the number of experts \(8\)"):
        on_one_rank(build("meta"), 3)
