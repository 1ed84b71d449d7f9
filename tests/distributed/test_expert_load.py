"""The fullest of four ranks, two of which share the experts, against rows counted from the routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import TokenGroups
from cantata.nn.moe.layer import MoELayer
from cantata.parallel.expert import apply_expert_parallel
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.train.expert_load import LoadWarning, PeakRows, largest_over_ranks
from tests.distributed.spawn import run_ranks
from tests.models.aria.small import small_aria, small_layout
from tests.train.test_window import result

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORLD, EP, EXPERTS, LAYERS, MICRO_BATCHES = 4, 2, 4, 2, 3


def chosen(layer: MoELayer, x_TD: Tensor, groups: TokenGroups) -> list[int]:
    """Tokens of this rank for each expert."""
    index_TK = layer.router(x_TD, groups).expert_index_TK
    return [int((index_TK == expert).sum()) for expert in range(EXPERTS)]


def watch() -> dict[str, Any]:
    rank = dist.get_rank()
    mesh = build_mesh(MeshConfig(1, -1, EP), WORLD, "cpu")
    assert mesh.experts is not None
    layers = small_aria(small_layout()).moe_layers()
    peaks = PeakRows(layers)
    for layer in layers:
        apply_expert_parallel(layer, mesh.experts["ep"])
    choices = []
    for micro_batch in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(10 * rank + micro_batch)
        tokens = 5 + 7 * rank + 3 * micro_batch
        x_TD = torch.randn(tokens, 32, generator=generator).requires_grad_()
        groups, twice = (
            TokenGroups(*[torch.zeros(n * tokens, dtype=torch.int64)] * 2, num_samples=1) for n in (1, 2)
        )
        choices.append([chosen(layer, x_TD, groups) for layer in layers])
        for layer in layers:
            layer(x_TD, groups)
            with torch.no_grad():
                layer(torch.cat((x_TD, x_TD)), twice)
    told: list[str] = []
    settings = {"even_rows": 10, "threshold": 1.5, "num_experts": EXPERTS, "ep": EP, "warn": told.append}
    LoadWarning(peaks, **settings).after_step(result(7))  # type: ignore[arg-type]
    return {"choices": choices, "told": told, "equal": largest_over_ranks([5, rank])}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(watch, WORLD)


def received(found: list[dict[str, Any]], layer: int, rank: int, micro_batch: int) -> int:
    """What the ranks of the group of `rank` chose among the experts that it holds."""
    group = [other for other in range(WORLD) if other // EP == rank // EP]
    held = [expert for expert in range(EXPERTS) if expert // (EXPERTS // EP) == rank % EP]
    return sum(found[other]["choices"][micro_batch][layer][expert] for other in group for expert in held)


def test_the_warning_names_the_fullest_rank_of_any_micro_batch(found: list[dict[str, Any]]) -> None:
    peaks = {}
    for layer in range(LAYERS):
        rows = [max(received(found, layer, rank, m) for m in range(MICRO_BATCHES)) for rank in range(WORLD)]
        peaks[layer] = (max(rows), rows.index(max(rows)))
    worst = max(peaks, key=lambda layer: peaks[layer][0])
    rows, rank = peaks[worst]
    first = rank % EP * (EXPERTS // EP)
    assert len(found[0]["told"]) == 1
    assert (
        f"step 7, layer {worst}: rank {rank} (experts {first} to {first + 1}) received {rows} rows"
        in found[0]["told"][0]
    )
    other_rows = peaks[1 - worst][0]
    assert f"; also in layer {1 - worst} ({other_rows / 10:.1f} times)" in found[0]["told"][0]


def test_only_rank_0_speaks_and_the_first_of_equal_ranks_is_named(found: list[dict[str, Any]]) -> None:
    assert all(rank["told"] == [] for rank in found[1:])
    assert all(rank["equal"] == [(5, 0), (3, 3)] for rank in found)
