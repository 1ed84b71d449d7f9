"""Groups of sharded parameters. Gradients and values are compared in tests/distributed/test_fsdp2.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cantata.parallel.fsdp import Sharding, apply_sharding, shard_dimension, sharded_modules
from cantata.parallel.mesh import MeshConfig, build_mesh
from tests.distributed.standin import StandIn, build_on_meta


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(tied: bool) -> StandIn:
    model = build_on_meta(tied)
    mesh = build_mesh(MeshConfig(1, -1, 1), 1, "cpu")
    apply_sharding(model, model.units(), mesh, Sharding(torch.bfloat16, offload_parameters=False))
    return model


def test_every_unit_is_a_group_and_names_stay() -> None:
    names = [name for name, _ in build_on_meta().named_parameters()]
    model = sharded(tied=False)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    groups = sharded_modules(model)
    assert groups[0] is model
    assert set(groups[1:]) == {unit.module for unit in model.units()}


def test_units_that_share_a_parameter_belong_to_the_root() -> None:
    model = sharded(tied=True)
    assert model.head.output.weight is model.embedding.weight
    assert not isinstance(model.head, FSDPModule)
    assert not isinstance(model.embedding, FSDPModule)
    assert set(sharded_modules(model)) == {model, *model.blocks}


@pytest.mark.parametrize(
    ("dtype", "offload", "is_whole"),
    [(torch.float32, False, True), (torch.float32, True, False), (torch.bfloat16, False, False)],
)
def test_one_rank_that_computes_in_what_it_keeps_shards_nothing(
    dtype: torch.dtype, offload: bool, is_whole: bool
) -> None:
    model = build_on_meta()
    mesh = build_mesh(MeshConfig(1, -1, 1), 1, "cpu")
    apply_sharding(model, model.units(), mesh, Sharding(dtype, offload_parameters=offload))
    assert (not sharded_modules(model)) is is_whole


@pytest.mark.parametrize(
    ("shape", "shards", "dimension"),
    [
        ((64, 2560, 3328), 8, 0),
        ((64, 2560, 3328), 256, 1),
        ((64, 1664, 2560), 256, 2),
        ((64, 1665, 2561), 256, 0),
        ((100, 256), 256, 0),
        ((7,), 4, 0),
    ],
)
def test_stacked_experts_are_cut_where_the_ranks_divide_them(
    shape: tuple[int, ...], shards: int, dimension: int
) -> None:
    assert shard_dimension(torch.Size(shape), shards) == dimension
