"""How the ranks are laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cantata.core.errors import ConfigError


@dataclass(frozen=True)
class MeshConfig:
    """The keys under `mesh`: how many ranks share each kind of work."""

    dp_replicate: int
    """Whole copies of the sharded model (hybrid sharding); 1 shards over every rank."""
    dp_shard: int
    """Ranks that a copy of the model is sharded over; -1 takes the rest."""
    ep: int
    """Ranks that the experts are spread over."""


class MeshSizes(NamedTuple):
    """The sizes of the mesh once -1 is resolved; their product is the world size."""

    dp_replicate: int
    dp_shard: int


def validate(config: MeshConfig, world_size: int) -> MeshSizes:
    """The sizes for `world_size` ranks; needs no process group, so it can run before one starts.

    Raises:
        ConfigError: a size is not positive, the sizes do not make up `world_size`, or `ep` is above 1.
    """
    if config.ep != 1:
        raise ConfigError(f"mesh.ep={config.ep}: expert parallelism is not available yet; set mesh.ep=1")
    if config.dp_replicate < 1:
        raise ConfigError(f"mesh.dp_replicate={config.dp_replicate} must be at least 1")
    if config.dp_shard < 1 and config.dp_shard != -1:
        raise ConfigError(f"mesh.dp_shard={config.dp_shard} must be at least 1, or -1 for the rest")
    shard = world_size // config.dp_replicate if config.dp_shard == -1 else config.dp_shard
    sizes = MeshSizes(config.dp_replicate, shard)
    if math.prod(sizes) != world_size:
        raise ConfigError(
            f"mesh.dp_replicate={config.dp_replicate} x mesh.dp_shard={config.dp_shard} does not make "
            f"the world of {world_size} ranks; change mesh.* or the number of processes"
        )
    return sizes


def build_mesh(config: MeshConfig, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh (dp_replicate, dp_shard) over every rank of the running process group.

    Raises:
        ConfigError: as `validate`.
    """
    sizes = validate(config, world_size)
    return init_device_mesh(device_type, tuple(sizes), mesh_dim_names=MeshSizes._fields)
