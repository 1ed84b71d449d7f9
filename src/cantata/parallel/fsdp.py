"""Shard a model with FSDP2, gradients summed and never averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from cantata.models.protocol import Unit
from cantata.nn.moe.experts import Experts
from cantata.parallel.mesh import RankMesh


@dataclass(frozen=True)
class Sharding:
    """What shards are computed with and where they rest."""

    compute_dtype: torch.dtype | None
    """Dtype of the gathered parameters; None computes in the dtype they are stored in."""
    offload_parameters: bool
    """Keep shards, gradients and optimizer state in host memory between their uses."""


def apply_sharding(model: nn.Module, units: Sequence[Unit], mesh: RankMesh, sharding: Sharding) -> None:
    """Shard each unit as one group, and what is left of the model as the root's group.

    Experts that are spread over ranks form groups of their own, over the ranks that hold the same ones. A
    parameter that two units share (a head tied to the embedding) must live in one group only, so
    units that share one are left to the root. Gradients are reduced in fp32 and summed: the loss is
    divided by the step's global totals before backward, so an average would divide twice, and experts have
    fewer ranks to sum over because the exchange's backward has summed the others' tokens already. A sum is
    forced because a factor alone becomes a pre-multiplied sum, which gloo lacks and which lost small
    bf16 gradients on NCCL (pytorch/pytorch#190745).

    One rank that computes in the dtype it keeps has nothing to gather, to sum or to cast: the model stays as
    it is, which saves a copy of each unit and, in small models, a third of a step.
    """
    if mesh.dense.size() == 1 and not sharding.offload_parameters and _computes_as_kept(model, sharding):
        return
    options = _options(mesh.device_type, sharding)
    in_fp32 = _options(mesh.device_type, replace(sharding, compute_dtype=torch.float32))
    owners = Counter(id(parameter) for unit in units for parameter in unit.module.parameters())
    groups: list[list[FSDPModule]] = []
    for unit in units:
        if unit.module is model or any(owners[id(p)] != 1 for p in unit.module.parameters()):
            continue
        inner = list(_spread_experts(unit.module)) if mesh.experts is not None else []
        for experts in inner:
            assert mesh.experts is not None
            _shard(experts, _fewest(mesh.experts, "efsdp"), options)
        _shard(unit.module, _fewest(mesh.dense, "dp_shard"), in_fp32 if unit.in_fp32 else options)
        groups.append([module for module in (unit.module, *inner) if isinstance(module, FSDPModule)])
    _shard(model, _fewest(mesh.dense, "dp_shard"), options)
    if mesh.experts is not None:
        _prefetch(groups)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _computes_as_kept(model: nn.Module, sharding: Sharding) -> bool:
    return all(parameter.dtype == sharding.compute_dtype for parameter in model.parameters())


def shard_dimension(shape: torch.Size, shards: int) -> int:
    """The dimension to cut: the first that `shards` divides, where the tensor is a stack of matrices.

    FSDP2 pads the first dimension to a multiple of the ranks. That costs little for a matrix, but 64
    experts on 256 ranks would be padded fourfold.
    """
    if len(shape) < 3:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % shards == 0), 0)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module that owns a group of sharded parameters, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _options(device_type: str, sharding: Sharding) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(
        param_dtype=sharding.compute_dtype,
        reduce_dtype=torch.float32,
        # Inputs arrive in the dtype that the model made them in; parameters alone are cast.
        cast_forward_inputs=False,
    )
    offload = (
        CPUOffloadPolicy(pin_memory=device_type != "cpu") if sharding.offload_parameters else OffloadPolicy()
    )
    return {"mp_policy": policy, "offload_policy": offload}


def _fewest(mesh: DeviceMesh, shard: str) -> DeviceMesh:
    """(dp_replicate, shard), or `shard` alone: one copy needs no all-reduce, nor its gradient buffer."""
    return mesh[shard] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", shard]


def _shard(module: nn.Module, mesh: DeviceMesh, options: dict[str, Any]) -> None:
    fully_shard(module, mesh=mesh, shard_placement_fn=_placement(mesh.size(mesh.ndim - 1)), **options)


def _placement(shards: int) -> Callable[[nn.Parameter], Shard]:
    def placement(parameter: nn.Parameter) -> Shard:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(shard_dimension(local.shape, shards))

    return placement


def _spread_experts(module: nn.Module) -> Iterator[Experts]:
    for part in module.modules():
        if isinstance(part, Experts) and any(isinstance(p, DTensor) for p in part.parameters()):
            yield part


def _prefetch(groups: Sequence[list[FSDPModule]]) -> None:
    """Gather the next unit while one runs; by itself FSDP2 would wait for the exchange's counts first."""
    for before, after in pairwise(groups):
        before[0].set_modules_to_forward_prefetch(after)
        after[0].set_modules_to_backward_prefetch(before)
