"""How the ranks are laid out.

Two views of the same ranks: the dense one (dp_replicate, dp_shard) for everything but the experts, and for
these (dp_replicate, efsdp, ep), where ep ranks in a row share one set of experts: dp_shard = efsdp * ep.
"""

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
    """Ranks that the experts are spread over: neighbours among the `dp_shard` ranks of a copy."""


class MeshSizes(NamedTuple):
    """The sizes of the mesh once -1 is resolved; the world is dp_replicate * dp_shard."""

    dp_replicate: int
    dp_shard: int
    ep: int

    @property
    def efsdp(self) -> int:
        """Ranks that the experts of one rank are sharded over."""
        return self.dp_shard // self.ep


@dataclass(frozen=True)
class RankMesh:
    """The device meshes of a run."""

    dense: DeviceMesh
    """(dp_replicate, dp_shard)."""
    experts: DeviceMesh | None
    """(dp_replicate, efsdp, ep); None where every rank holds all experts (ep = 1)."""

    @property
    def device_type(self) -> str:
        return self.dense.device_type

    @property
    def ep(self) -> int:
        return 1 if self.experts is None else self.experts["ep"].size()

    def size(self) -> int:
        """All ranks."""
        return self.dense.size()


def validate(config: MeshConfig, world_size: int) -> MeshSizes:
    """The sizes for `world_size` ranks; needs no process group, so it can run before one starts.

    Raises:
        ConfigError: a size is not positive, or the sizes do not fit each other or `world_size`.
    """
    for key in ("dp_replicate", "ep"):
        if getattr(config, key) < 1:
            raise ConfigError(f"mesh.{key}={getattr(config, key)} must be at least 1")
    if config.dp_shard < 1 and config.dp_shard != -1:
        raise ConfigError(f"mesh.dp_shard={config.dp_shard} must be at least 1, or -1 for the rest")
    shard = world_size // config.dp_replicate if config.dp_shard == -1 else config.dp_shard
    if math.prod((config.dp_replicate, shard)) != world_size:
        raise ConfigError(
            f"mesh.dp_replicate={config.dp_replicate} x mesh.dp_shard={config.dp_shard} does not make "
            f"the world of {world_size} ranks; change mesh.* or the number of processes"
        )
    if shard % config.ep:
        raise ConfigError(
            f"mesh.ep={config.ep} must divide the {shard} ranks of a copy (mesh.dp_shard); "
            "change mesh.* or the number of processes"
        )
    return MeshSizes(config.dp_replicate, shard, config.ep)


def build_mesh(config: MeshConfig, world_size: int, device_type: str) -> RankMesh:
    """The meshes over every rank of the running process group.

    Raises:
        ConfigError: as `validate`.
    """
    sizes = validate(config, world_size)
    dense = init_device_mesh(
        device_type, (sizes.dp_replicate, sizes.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    if sizes.ep == 1:
        return RankMesh(dense, None)
    experts = init_device_mesh(
        device_type,
        (sizes.dp_replicate, sizes.efsdp, sizes.ep),
        mesh_dim_names=("dp_replicate", "efsdp", "ep"),
    )
    return RankMesh(dense, experts)
