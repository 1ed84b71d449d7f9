"""How the tensors of a checkpoint get onto the disk: a thread, a copy in host memory, and DCP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from cantata.train.checkpoint_sums import FileSum, SummingWriter
from cantata.train.checkpoint_tensors import reason


def writer_thread() -> ThreadPoolExecutor:
    """One thread, on this rank's device: a new thread starts on device 0, which may be another rank's."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(1, "checkpoint")
    return ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (torch.cuda.current_device(),))


def copy_to_host(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, sharded as they are, in memory that training does not touch."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    copies = DefaultStager(options).stage(tensors)
    assert isinstance(copies, dict)
    return copies


def write_tensors(
    folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup
) -> tuple[dict[str, FileSum], str | None]:
    """Write every rank's tensors; returns the sums of all files by name, and the reason where a rank failed.

    A collective over `group`. Raises `RuntimeError` where a rank is lost.
    """
    writer = SummingWriter(folder)
    try:
        save_tensors(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        return {}, reason(error)
    sums: list[dict[str, FileSum]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(sums, writer.sums, group=group)
    return {name: one for part in sums for name, one in part.items()}, None
