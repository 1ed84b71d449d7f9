"""Processes: who am I among how many, and the few collectives that need no tensor plan.

Torchrun, the deepspeed launcher and accelerate all set `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; srun
sets `SLURM_*`; without either there is one process. One process has a group too, so that there is
one code path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.errors import ConfigError, RunError

_LOST_RANK = re.compile(r"(?i)connection (closed|reset) by peer|broken pipe|remote process exited")


class Process(NamedTuple):
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    """Rank on this machine: the index of its device."""
    master_addr: str | None
    """Where rank 0 listens; None where the launcher does not say."""
    master_port: int | None


def find_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read the launcher's variables; raises `ConfigError` where they make no sense."""
    addr, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in environment and "SLURM_NTASKS" in environment:
        # A batch script has SLURM_NTASKS as well, but only srun's tasks have a step.
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        addr = addr or _first_node(environment.get("SLURM_JOB_NODELIST", ""))
        port = port or 15000 + (_number(environment, "SLURM_JOB_ID") or 0) % 15000
    else:
        return Process(0, 1, 0, addr, port)
    rank, world_size, local_rank = (_number(environment, name) or 0 for name in names)
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]}={rank} is not below {names[1]}={world_size} in the environment")
    return Process(rank, world_size, local_rank, addr, port)


@contextmanager
def distributed(patience: float | None = None) -> Iterator[Process]:
    """The process group for the duration of a run: gloo for CPU tensors, NCCL for CUDA ones.

    `patience`: seconds that a rank waits for the others, to start and in each collective of this group, until
    it fails; None leaves it to torch.

    A run that fails leaves its group standing: taking it down waits for peers, and they
    learn of the failure from the closed connection or from their launcher.
    Raises `ConfigError` where the launcher's variables or the devices do not fit, and `RunError` where
    another rank is lost.
    """
    process = find_process()
    inherited = {name: os.environ.get(name) for name in _exported(process)}
    os.environ.update(_exported(process))
    clean = False
    try:
        _start(process, patience)
        yield process
        barrier()
        clean = True
    except RuntimeError as error:
        if lost := lost_rank(error):
            raise RunError(
                f"another rank was lost ({lost}); its log, its launcher or the kernel's log says why (out "
                "of memory?); the same command goes on from the last checkpoint"
            ) from error
        raise
    finally:
        if dist.is_initialized() and (clean or process.world_size == 1):
            dist.destroy_process_group()
        for name, value in inherited.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def lost_rank(error: Exception) -> str:
    """What gloo or NCCL say in short of a rank that is gone; empty where the error is another one."""
    found = _LOST_RANK.search(str(error))
    return found[0] if found else ""


def rank() -> int:
    """This process' rank; without a group, the one its launcher gave it."""
    return dist.get_rank() if dist.is_initialized() else find_process().rank


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device of this process' tensors."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every rank is here; the host waits, queued kernels do not."""
    all_reduce_sum([0.0])


@overload
def all_reduce_sum(values: Tensor) -> Tensor: ...


@overload
def all_reduce_sum(values: Sequence[float]) -> list[float]: ...


def all_reduce_sum(values: Tensor | Sequence[float]) -> Tensor | list[float]:
    """Sum over ranks, element by element; numbers travel in fp64. The argument stays as it is."""
    if not isinstance(values, Tensor):
        total: list[float] = all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()
        return total
    result = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result)
    return result


def gather_strings(text: str) -> list[str]:
    """The text of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [text]
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return texts


def _start(process: Process, patience: float | None) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if process.local_rank >= count:
            raise ConfigError(
                f"local rank {process.local_rank} has no device: this machine shows {count} CUDA devices; "
                f"start at most {count} processes on it"
            )
        torch.cuda.set_device(process.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if process.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    if process.master_addr is None or process.master_port is None:
        raise ConfigError("MASTER_ADDR and MASTER_PORT are not set; start several processes with a launcher")
    timeout = None if patience is None else timedelta(seconds=patience)
    dist.init_process_group(backend, timeout=timeout, rank=process.rank, world_size=process.world_size)


def _exported(process: Process) -> dict[str, str]:
    """The variables that libraries read (DeepSpeed, accelerate), whoever started us."""
    variables = {
        "RANK": str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "LOCAL_RANK": str(process.local_rank),
    }
    if process.master_addr is not None and process.master_port is not None:
        variables |= {"MASTER_ADDR": process.master_addr, "MASTER_PORT": str(process.master_port)}
    return variables


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def _first_node(node_list: str) -> str | None:
    """The first name of SLURM's list: `gpu[03-05,9],cpu1` gives `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        return None
    return "".join(part or "" for part in match.groups())
