"""Where experts go, on ranks that are only pretended. Values are compared in tests/distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from cantata.core.errors import ConfigError
from cantata.models.aria import Aria
from cantata.nn.moe.exchange import ExchangeDispatcher
from cantata.parallel.expert import apply_expert_parallel, local_part
from cantata.parallel.fsdp import Sharding, sharded_modules
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.parallel.plan import apply_plan
from cantata.parallel.recompute import Recompute
from tests.models.aria.small import small_layout
from tests.nn.moe.small import balance

EXPERTS = 8


@pytest.fixture
def pretend() -> Iterator[Callable[[int, int], None]]:
    def start(world_size: int, rank: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    dist.destroy_process_group()


def build(num_experts: int = EXPERTS) -> Aria:
    moe = {"num_experts": num_experts, "balance": balance(num_experts)}
    with torch.device("meta"):
        return Aria(*small_layout(moe=moe))


def planned(mesh: MeshConfig, model: Aria) -> Aria:
    ranks = build_mesh(mesh, dist.get_world_size(), "cpu")
    sharding = Sharding(torch.bfloat16, offload_parameters=False)
    apply_plan(model, recompute=Recompute.none, compile=False, mesh=ranks, sharding=sharding)
    return model


def test_every_rank_keeps_its_run_of_the_experts(pretend: Callable[[int, int], None]) -> None:
    pretend(4, 3)
    model, whole = build(), build()
    layer = model.moe_layers()[0]
    layer.experts.fc2.requires_grad_(False)
    mesh = build_mesh(MeshConfig(1, -1, 4), 4, "cpu").experts
    assert mesh is not None
    apply_expert_parallel(layer, mesh["ep"])
    fc1 = layer.experts.fc1
    assert isinstance(fc1, DTensor)
    assert fc1.shape == whole.moe_layers()[0].experts.fc1.shape
    assert local_part(fc1).shape == (2, *fc1.shape[1:])
    assert fc1.placements == (Shard(0),)
    assert not layer.experts.fc2.requires_grad
    assert isinstance(layer.dispatcher, ExchangeDispatcher)
    assert layer.dispatcher.group.size() == 4
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]


def test_neighbours_share_the_experts(pretend: Callable[[int, int], None]) -> None:
    """Ranks 4 to 7 of 8, the second set of experts' ranks, on the node of rank 5."""
    pretend(8, 5)
    mesh = build_mesh(MeshConfig(1, -1, 4), 8, "cpu")
    assert mesh.experts is not None
    assert mesh.experts["ep"].mesh.tolist() == [4, 5, 6, 7]
    assert mesh.experts["efsdp"].mesh.tolist() == [1, 5]
    assert (mesh.ep, mesh.size()) == (4, 8)


@pytest.mark.parametrize(
    ("mesh", "experts", "cut"),
    [
        ((1, -1, 2), 16, 0),
        ((1, -1, 8), 8, 0),
        ((1, -1, 4), 4, 1),  # one expert a rank, two ranks that share it
        ((2, -1, 4), 8, 0),
        ((2, -1, 2), 2, 1),
    ],
)
def test_experts_are_cut_twice_without_padding(
    mesh: tuple[int, int, int], experts: int, cut: int, pretend: Callable[[int, int], None]
) -> None:
    pretend(8, 1)
    model = planned(MeshConfig(*mesh), build(experts))
    replicate = mesh[0]
    for parameter in model.moe_layers()[0].experts.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements[-1] == Shard(0)
        assert parameter.placements[-2].dim == cut  # type: ignore[attr-defined]
        assert parameter.to_local().numel() * (8 // replicate) == parameter.numel()
    dense = model.text.layers[0].self_attn.q_proj.weight
    assert dense.to_local().numel() * (8 // replicate) == dense.numel()


def test_experts_are_groups_of_their_own_and_are_fetched_ahead(pretend: Callable[[int, int], None]) -> None:
    pretend(8, 0)
    model = planned(MeshConfig(1, -1, 2), build())
    groups = sharded_modules(model)
    assert all(layer.experts in groups for layer in model.moe_layers())
    first, second = model.text.layers
    state = first._get_fsdp_state()
    assert [s._fsdp_param_group for s in state._states_to_forward_prefetch] == [
        part._get_fsdp_state()._fsdp_param_group for part in (second, second.mlp.experts)
    ]
    state = second._get_fsdp_state()
    assert [s._fsdp_param_group for s in state._states_to_backward_prefetch] == [
        part._get_fsdp_state()._fsdp_param_group for part in (first, first.mlp.experts)
    ]


def test_experts_that_do_not_divide_are_one_line(pretend: Callable[[int, int], None]) -> None:
    pretend(4, 0)
    with pytest.raises(ConfigError, match=r"mesh\.ep=4 must divide the number of experts \(6\)"):
        planned(MeshConfig(1, -1, 4), build(6))
