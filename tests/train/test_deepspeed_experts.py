"""Experts set apart for DeepSpeed. Training with them is tested in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from cantata.train.deepspeed_experts import SpreadExperts, separate


def spread(ep: int) -> SpreadExperts:
    mesh: Any = SimpleNamespace(ep=ep)
    return SpreadExperts(frozenset({"experts"}), mesh)


def test_experts_get_groups_of_their_own_with_the_same_rules() -> None:
    dense, expert, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [
        {"name": "default", "params": [dense, expert], "lr": 1.0},
        {"name": "slow", "params": [other], "lr": 0.1},
    ]
    assert separate(groups, {expert, other}, "ep_size_2") == [
        {"name": "default", "params": [dense], "lr": 1.0},
        {"name": "ep_size_2", "params": [expert], "lr": 1.0, "moe": True},
        {"name": "ep_size_2", "params": [other], "lr": 0.1, "moe": True},
    ]
    assert groups[0]["params"] == [dense, expert]


def test_a_part_begins_where_those_of_the_ranks_before_end() -> None:
    local = torch.zeros(2, 3)
    experts = spread(ep=2)
    for rank, start in enumerate((0, 6, 0, 6)):
        with mock.patch("torch.distributed.get_rank", lambda rank=rank: rank):
            assert experts.start("experts", local) == start
            assert experts.start("dense", local) == 0


def test_neighbours_hold_all_experts_together() -> None:
    experts = spread(ep=2)
    assert [experts.are_neighbours(2, rank) for rank in range(5)] == [False, False, True, True, False]
    assert not spread(ep=1).are_neighbours(0, 1)
