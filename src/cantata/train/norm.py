"""The norm of all gradients, wherever their shards lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients and ranks, a plain fp64 scalar.

    Squares of local shards are summed per mesh, over the ranks that hold different shards, and then over
    meshes, since no operation spans two of them. All in fp64: in fp32 a million squares lose up to 1e-4 of
    the norm, differently for every sharding.
    """
    squares = []
    for members in by_mesh(gradients):
        norms = torch.stack(torch._foreach_norm(_shards(members), 2, dtype=torch.float64))
        squares.append(_sum_over_shards(norms.square().sum(), members[0]))
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(squares).sum().sqrt()


def _sum_over_shards(square: Tensor, like: Tensor) -> Tensor:
    """Sum over the mesh dimensions that shard `like`."""
    if not isinstance(like, DTensor):
        return square
    for dimension, placement in enumerate(like.placements):
        if not placement.is_replicate():
            dist.all_reduce(square, group=like.device_mesh.get_group(dimension))
    return square


def clip(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale every gradient by `max_norm / norm` where that is below 1."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        # Shards alone: for a list of DTensors torch plans for seconds, once for every mesh.
        factor = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(_shards(gradients), factor.to(gradients[0].device))


def _shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors that are sharded over the same dimensions of a mesh together, plain ones together."""
    groups: dict[tuple[DeviceMesh, tuple[bool, ...]] | None, list[Tensor]] = {}
    for tensor in tensors:
        key = None
        if isinstance(tensor, DTensor):
            key = tensor.device_mesh, tuple(placement.is_replicate() for placement in tensor.placements)
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())
