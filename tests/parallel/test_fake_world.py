"""A fake world has real meshes and takes no time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cantata.parallel.fake_world import fake_world
from cantata.parallel.mesh import MeshConfig, build_mesh


def test_this_process_is_rank_0_of_many() -> None:
    with fake_world(512):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 512)
        mesh = build_mesh(MeshConfig(dp_replicate=2, dp_shard=-1, ep=8), 512, "cpu")
        assert mesh.dense.shape == (2, 256)
        assert mesh.experts is not None
        assert mesh.experts.shape == (2, 32, 8)
        assert mesh.experts["ep"].mesh.tolist() == list(range(8))
        assert mesh.experts["efsdp"].mesh.tolist() == list(range(0, 256, 8))
        dist.all_reduce(torch.ones(3))
    assert not dist.is_initialized()


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), fake_world(2):
        raise KeyError
    assert not dist.is_initialized()


def test_worlds_do_not_nest() -> None:
    with fake_world(2), pytest.raises(RuntimeError, match="inside a process group"), fake_world(4):
        pass
    assert not dist.is_initialized()
