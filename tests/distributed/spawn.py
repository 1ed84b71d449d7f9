"""Run a function on several gloo ranks, each a process of its own, and hand back what every rank returned."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE_S = 5.0
"""How long the other ranks may go on after one has failed: they usually wait for it in a collective."""

PRELOAD = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]
"""Imported once by the server that ranks are forked from: seconds for each rank. None may start a thread."""


class RanksError(AssertionError):
    """At least one rank raised, died or ran out of time; the message holds every rank's traceback."""

    def __init__(self, message: str, exit_codes: list[int | None]) -> None:
        super().__init__(message)
        self.exit_codes = exit_codes


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks inside a gloo process group; returns their values by rank.

    `fn` must be importable (defined at a module's top level) and its arguments and value picklable.
    The ranks see the variables of torchrun (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...).

    Native code that aborts a rank gets a second chance, with a warning that says where it stood: gloo has
    done so once in hundreds of runs, and nothing in Python can.

    Raises:
        RanksError: with the traceback of every rank that failed, and for ranks that hung or were aborted the
            stack in which they stood.
    """
    try:
        return _run(fn, world_size, *args, timeout=timeout)
    except RanksError as error:
        if -signal.SIGABRT not in error.exit_codes:
            raise
        warnings.warn(f"native code aborted a rank; once more: {error}", stacklevel=2)
        return _run(fn, world_size, *args, timeout=timeout)


def _run(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = free_port()
        # Pickled here, because multiprocessing would hand tensors over one by one as open files.
        call = pickle.dumps((fn, args))
        ranks: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(Parent(), call, rank, world_size, port, folder, timeout))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        timed_out = _wait(ranks, timeout, Path(folder))
        exit_codes = [process.exitcode for process in ranks]
        if timed_out or any(exit_codes):
            raise RanksError(_report(Path(folder), exit_codes, timed_out, timeout), exit_codes)
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


class Parent:
    """What a rank would inherit if it were forked from here: the environment and where output goes."""

    def __getstate__(self) -> dict[str, Any]:
        return {"environment": dict(os.environ), "streams": [reduction.DupFd(1), reduction.DupFd(2)]}

    def inherit(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        for number, stream in enumerate(self.streams, start=1):
            os.dup2(stream.detach(), number)


def _rank_main(
    parent: Parent,
    call: bytes,
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    timeout: float,
) -> None:
    parent.inherit()
    # Stays open for as long as the process lives.
    stacks = (Path(folder) / f"{rank}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(file=stacks, all_threads=True)
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        fn, args = pickle.loads(call)
        # DeepSpeed collects garbage with every engine: a third of a second over all that is imported.
        gc.freeze()
        value = fn(*args)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(value))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        # Interpreter shutdown would wait for collectives that the other ranks never join.
        os._exit(1)


def _wait(ranks: list[BaseProcess], timeout: float, folder: Path) -> bool:
    """Wait for every rank, kill what is left over; True when time ran out."""
    deadline = time.monotonic() + timeout
    failed = False
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    left = [process for process in ranks if process.is_alive()]
    for process in left:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    if left:
        time.sleep(0.5)
    for process in left:
        process.kill()
    for process in ranks:
        process.join()
    return bool(left) and not failed


def _report(folder: Path, exit_codes: list[int | None], timed_out: bool, timeout: float) -> str:
    lines = [f"ranks did not finish in {timeout:.0f} s" if timed_out else "ranks failed"]
    for rank, code in enumerate(exit_codes):
        error, stacks = folder / f"{rank}.error", folder / f"{rank}.stacks"
        lines.append(f"--- rank {rank}: exit code {code}")
        if error.exists():
            lines.append(error.read_text())
        elif stacks.exists():
            lines.append(stacks.read_text())
    return "\n".join(lines)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
