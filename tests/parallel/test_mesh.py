"""World sizes are checked before anything starts."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from cantata.core.errors import ConfigError
from cantata.parallel.mesh import MeshConfig, MeshSizes, build_mesh, validate


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "sizes"),
    [(1, -1, 1, (1, 1)), (1, -1, 6, (1, 6)), (2, -1, 6, (2, 3)), (2, 3, 6, (2, 3)), (3, 1, 3, (3, 1))],
)
def test_sizes(replicate: int, shard: int, world_size: int, sizes: tuple[int, int]) -> None:
    assert validate(MeshConfig(replicate, shard, ep=1), world_size) == MeshSizes(*sizes)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (MeshConfig(2, -1, 1), 3, "does not make the world of 3 ranks"),
        (MeshConfig(4, -1, 1), 2, "does not make the world of 2 ranks"),
        (MeshConfig(1, 4, 1), 2, "does not make the world of 2 ranks"),
        (MeshConfig(0, -1, 1), 2, "mesh.dp_replicate=0"),
        (MeshConfig(1, 0, 1), 2, "mesh.dp_shard=0"),
        (MeshConfig(1, -1, 2), 2, "expert parallelism is not available yet; set mesh.ep=1"),
    ],
)
def test_what_does_not_fit_is_one_line(config: MeshConfig, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(config, world_size)
    assert "\n" not in str(caught.value)


def test_one_process_has_a_mesh_too() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh(MeshConfig(1, -1, 1), 1, "cpu")
        assert mesh.mesh_dim_names == ("dp_replicate", "dp_shard")
        assert mesh.shape == (1, 1)
    finally:
        dist.destroy_process_group()
