"""A world of many ranks in one process, for what needs shapes and no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """Be rank 0 of `size` for a while: groups and meshes are real, collectives return at once and do nothing.

    Raises `RuntimeError` inside a real world.
    """
    if dist.is_initialized():
        raise RuntimeError("a fake world cannot start inside a process group")
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
