"""Runs that a drill can disturb: each rank a process, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

from tests.distributed.spawn import PRELOAD, Parent, free_port
from tests.recipes.runner import TINY, final, metrics, run

SETTINGS = ("train.max_steps=8", "checkpoint.every=3", "data.num_workers=1", "data.prefetch=2")
"""One command for all drills: three saves, of which the last is the end."""
STEPS = list(range(1, 9))
IMPORTS = [*PRELOAD, "tests.recipes.runner", "cantata.infer.captions", "cantata.train.session"]


class Ranks:
    """The processes of a run; what they print is kept apart."""

    def __init__(self, processes: list[BaseProcess], logs: list[Path], out: Path) -> None:
        self.processes = processes
        self.out = out
        self._logs = logs

    def text(self, rank: int = 0) -> str:
        return self._logs[rank].read_text()

    def errors(self, rank: int = 0) -> list[str]:
        return [line for line in self.text(rank).splitlines() if line.startswith("error: ")]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        """Until the condition holds; no rank may end before."""
        end = time.monotonic() + seconds
        while not condition():
            assert all(one.is_alive() for one in self.processes), self.text()
            assert time.monotonic() < end, f"the run does not get there: {self.text()}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Until these processes, and not those before them, have made it."""
        told = re.compile(r"^step +(\d+)/", re.MULTILINE)
        self.wait_for(lambda: any(int(number) >= step for number in told.findall(self.text())))

    def wait_for_checkpoint(self, step: int) -> None:
        """Until it is complete: a save in the background takes its time."""
        latest = self.out / "LATEST"
        self.wait_for(lambda: latest.exists() and latest.read_text() == f"step-{step:08d}\n")

    def block_save(self, step: int) -> None:
        """Let the save of `step` stand still half-written, and with it, sooner or later, the run.

        Opening a pipe that nobody reads blocks for ever. A start clears such leftovers before its report.
        """
        self.wait_for(lambda: "  devices " in self.text())
        folder = self.out / "checkpoints" / f"step-{step:08d}.incomplete"
        folder.mkdir(parents=True)
        os.mkfifo(folder / "__0_0.distcp")

    def exit_codes(self, seconds: float = 300.0) -> list[int | None]:
        """Of ranks that end by themselves."""
        for one in self.processes:
            one.join(seconds)
        return [one.exitcode for one in self.processes]

    def workers(self, rank: int = 0) -> list[psutil.Process]:
        """The data workers of a rank."""
        return psutil.Process(self.processes[rank].pid).children()

    def kill(self, *ranks: int) -> None:
        """kill -9; all of them where none is named."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
            self.processes[rank].join()


@contextmanager
def started(out: Path, *overrides: str, world_size: int = 1) -> Iterator[Ranks]:
    """`cantata pretrain` with the tiny model and `SETTINGS`; what is left of it in the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    port, number = free_port(), len(list(out.parent.glob("*.log")))
    logs = [out.parent / f"{number}-{rank}.log" for rank in range(world_size)]
    arguments = ("pretrain", *TINY, f"out={out}", *SETTINGS, *overrides)
    processes: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(Parent(), rank, world_size, port, logs[rank], arguments))
        for rank in range(world_size)
    ]
    for log in logs:
        log.touch()
    for one in processes:
        one.start()
    ranks = Ranks(processes, logs, out)
    try:
        yield ranks
    finally:
        ranks.kill()


def _rank_main(
    parent: Parent, rank: int, world_size: int, port: int, log: Path, arguments: tuple[str, ...]
) -> None:
    parent.inherit()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="200", GLOO_SOCKET_IFNAME="lo")
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    # As in a process that a user starts; here it would be the server's own.
    multiprocessing.set_start_method("fork", force=True)
    sys.exit(run(*arguments))


def assert_undisturbed(out: Path, whole: Path) -> None:
    """Nothing was lost: the same weights, optimizer and random state, and metrics without gap or repeat."""
    left, right = final(out), final(whole)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    told, wanted = metrics(out), metrics(whole)
    assert [line["step"] for line in told] == STEPS
    assert [line["loss"] for line in told] == [line["loss"] for line in wanted]
    assert not list(out.glob("checkpoints/*.incomplete"))
