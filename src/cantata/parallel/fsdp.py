"""Shard a model with FSDP2, gradients summed and never averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
from torch.distributed.tensor import Shard

from cantata.models.protocol import Unit


@dataclass(frozen=True)
class Sharding:
    """Over which ranks a model is sharded, how the shards are computed with and where they rest."""

    mesh: DeviceMesh
    """(dp_replicate, dp_shard), from `build_mesh`."""
    compute_dtype: torch.dtype | None
    """Dtype of the gathered parameters; None computes in the dtype they are stored in."""
    offload_parameters: bool
    """Keep shards, gradients and optimizer state in host memory between their uses."""


def apply_sharding(model: nn.Module, units: Sequence[Unit], sharding: Sharding) -> None:
    """Shard each unit as one group, and what is left of the model as the root's group.

    A parameter that two units share (a head tied to the embedding) must live in one group only, so
    units that share one are left to the root. Gradients are reduced in fp32 and summed: the loss is
    divided by the step's global totals before backward, so an average would divide twice. A sum is
    forced because a factor alone becomes a pre-multiplied sum, which gloo lacks and which lost small
    bf16 gradients on NCCL (pytorch/pytorch#190745).
    """
    # One copy needs no second dimension, whose all-reduce would cost a gradient buffer.
    mesh = sharding.mesh["dp_shard"] if sharding.mesh.size(0) == 1 else sharding.mesh
    policy = MixedPrecisionPolicy(
        param_dtype=sharding.compute_dtype,
        reduce_dtype=torch.float32,
        # Inputs arrive in the dtype that the model made them in; parameters alone are cast.
        cast_forward_inputs=False,
    )
    offload = (
        CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        if sharding.offload_parameters
        else OffloadPolicy()
    )
    shards = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter.shape, shards))

    shard = partial(
        fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload, shard_placement_fn=placement
    )
    owners = Counter(id(parameter) for unit in units for parameter in unit.module.parameters())
    for unit in units:
        if unit.module is not model and all(owners[id(p)] == 1 for p in unit.module.parameters()):
            shard(unit.module)
    shard(model)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


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
