"""World sizes are checked before anything starts."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from cantata.core.errors import ConfigError
from cantata.parallel.mesh import MeshConfig, MeshSizes, build_mesh, validate


@pytest.mark.parametrize(
    ("config", "world_size", "sizes"),
    [
        ((1, -1, 1), 1, (1, 1, 1)),
        ((1, -1, 1), 6, (1, 6, 1)),
        ((2, -1, 1), 6, (2, 3, 1)),
        ((2, 3, 3), 6, (2, 3, 3)),
        ((3, 1, 1), 3, (3, 1, 1)),
        ((1, -1, 2), 6, (1, 6, 2)),
        ((2, -1, 4), 16, (2, 8, 4)),
    ],
)
def test_sizes(config: tuple[int, int, int], world_size: int, sizes: tuple[int, int, int]) -> None:
    found = validate(MeshConfig(*config), world_size)
    assert found == MeshSizes(*sizes)
    assert found.efsdp * found.ep == found.dp_shard


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (MeshConfig(2, -1, 1), 3, "does not make the world of 3 ranks"),
        (MeshConfig(4, -1, 1), 2, "does not make the world of 2 ranks"),
        (MeshConfig(1, 4, 1), 2, "does not make the world of 2 ranks"),
        (MeshConfig(0, -1, 1), 2, "mesh.dp_replicate=0"),
        (MeshConfig(1, 0, 1), 2, "mesh.dp_shard=0"),
        (MeshConfig(1, -1, 0), 2, "mesh.ep=0"),
        (MeshConfig(1, -1, 3), 4, "mesh.ep=3 must divide the 4 ranks of a copy"),
        (MeshConfig(2, -1, 4), 4, "mesh.ep=4 must divide the 2 ranks of a copy"),
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
        assert mesh.dense.mesh_dim_names == ("dp_replicate", "dp_shard")
        assert mesh.dense.shape == (1, 1)
        assert (mesh.experts, mesh.ep, mesh.size(), mesh.device_type) == (None, 1, 1, "cpu")
    finally:
        dist.destroy_process_group()
