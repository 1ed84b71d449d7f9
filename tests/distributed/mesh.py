"""Meshes shared by all that runs on a rank."""

from __future__ import annotations

from functools import cache

import torch.distributed as dist

from cantata.parallel.mesh import MeshConfig, RankMesh, build_mesh


@cache
def mesh_of(config: MeshConfig) -> RankMesh:
    """One mesh serves every engine: its groups, and torch's plans for tensors on it, outlast a step."""
    return build_mesh(config, dist.get_world_size(), "cpu")
