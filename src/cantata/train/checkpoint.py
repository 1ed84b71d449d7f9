"""Checkpoints that are complete or not there, and that load on any layout.

checkpoints/step-00000100.incomplete/    while it is written
checkpoints/step-00000100/               afterwards: the rename is the moment it counts
    .metadata, __0_0.distcp, ...         tensors (torch.distributed.checkpoint)
    state.json                           everything else
    checksums.json                       size and CRC-32 of each of these files
checkpoints/step-00000100.damaged/       what no longer matched them when a run wanted to go on from it
LATEST                                   name of the newest one, for people and scripts
BEST                                     name of the one that `checkpoint.best` asks for
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from cantata.core.dist import lost_rank
from cantata.core.errors import CantataError, ConfigError, RunError
from cantata.parallel.materialize import persistent_tensors
from cantata.train import rng
from cantata.train.best import BestConfig
from cantata.train.checkpoint_files import CheckpointFiles, is_complete, read_state
from cantata.train.checkpoint_sums import damage_seen_by_any
from cantata.train.checkpoint_tensors import differences, reason
from cantata.train.checkpoint_writing import copy_to_host, write_tensors, writer_thread
from cantata.train.engine import Engine
from cantata.train.restricted_pickle import RestrictedReader, tensor_shapes
from cantata.train.run_lock import RunLock

# A rank waits for the slowest disk among all ranks, and nothing trains less for it.
_TIMEOUT = timedelta(hours=2)
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointConfig:
    """The keys under `checkpoint`."""

    every: int
    """Steps between two checkpoints; 0 saves only when the run ends or is stopped."""
    keep: int
    """Newest checkpoints to keep."""
    background: bool
    """Write while training goes on, from a copy in host memory."""
    resume: str
    """`auto`: the newest complete one of this run directory, if any. A checkpoint's path: where a new run
    directory starts from; once it has checkpoints of its own, those. `never`: refuse a directory with any."""
    best: BestConfig | None
    """Save at each evaluation that is the best so far, name it in `BEST` and keep it; null: none is."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every={self.every} must be 0 or a number of steps")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep} must be at least 1")


def fingerprint(model: nn.Module) -> str:
    """A digest of the names and whole shapes of everything that a checkpoint of `model` holds."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in persistent_tensors(model))
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


class Checkpointer:
    """Saves and finds the checkpoints of one run directory, which it locks.

    Every method is a collective: all ranks call it together. Rank 0 decides and publishes.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, fingerprint: str) -> None:
        """Lock the directory and clear what an interrupted save left in it.

        Raises:
            ConfigError: another process uses the directory, or `checkpoint.resume` does not fit what
                lies in it.
        """
        self._config = config
        self._fingerprint = fingerprint
        self._rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._files = CheckpointFiles(run_dir)
        self._lock: RunLock | None = None
        self._writer = writer_thread()
        self._pending: Future[None] | None = None
        self._last_step: int | None = None
        self._on_main(self._open)

    @property
    def every(self) -> int:
        return self._config.every

    @property
    def is_saved(self) -> bool:
        """The last save is complete on this rank, not failed; unlike the other methods no collective."""
        return self._pending is None or (self._pending.done() and self._pending.exception() is None)

    def raise_if_failed(self) -> None:
        """Raise the `RunError` of a background save that has ended badly; unlike the others no collective."""
        if self._pending is not None and self._pending.done() and not self.is_saved:
            self.wait()

    def path(self, step: int) -> Path:
        """Where the complete checkpoint of a step stands."""
        return self._files.published(step)

    def latest(self) -> Path | None:
        """The newest complete checkpoint of the run directory."""
        return self._on_main(self._files.newest)

    def resume_from(self, warn: Callable[[str], None] = log.warning) -> Path | None:
        """The checkpoint that `checkpoint.resume` asks for, compared with its sums; None starts anew.

        Where an older one is sound, damaged ones of this directory are set aside, and rank 0 warns.
        Raises `RunError` where none is sound, or not the one asked for by its path.
        """
        damaged: dict[Path, str] = {}
        for path in self._on_main(self._files.newest_first):
            problem = damage_seen_by_any(path, self._group)
            if not problem:
                lines = self._on_main(partial(self._files.set_aside, damaged, path))
                for line in lines if self._rank == 0 else ():
                    warn(line)
                return path
            damaged[path] = problem
        if damaged:
            listed = "; ".join(f"{path}: {problem}" for path, problem in damaged.items())
            advice = "nothing was changed: put the files back, or start anew with another out="
            raise RunError(f"no sound checkpoint is left to go on from ({listed}); {advice}")
        if self._config.resume in ("auto", "never"):
            return None
        asked = Path(self._config.resume)
        if problem := damage_seen_by_any(asked, self._group):
            raise RunError(f"checkpoint.resume={asked} is damaged ({problem}); name another checkpoint")
        return asked

    def keep_best(self, step: int) -> bool:
        """Name that of `step` in `BEST`; False where it is not in this directory."""
        return self._on_main(lambda: self._files.name_best(step))

    def save(
        self,
        step: int,
        engine: Engine,
        loader_state: Mapping[str, Any],
        extra: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> bool:
        """Write step `step`; in background mode return once the tensors are copied to host memory.

        Saving the step just saved or loaded does nothing and returns False.
        Args:
            loader_state: JSON values by logical stream; every rank gives its own streams.
            extra: JSON values, the same on every rank (rank 0's are kept).
            best: name it in `BEST` once it is complete.

        Raises:
            RunError: this save failed, or the background save before it did.
        """
        self.wait()
        if step == self._last_step:
            return False
        tensors = engine.state_dict()
        tensors |= {f"rng.{self._rank}.{name}": state for name, state in rng.capture().items()}
        document = {
            "step": step,
            "fingerprint": self._fingerprint,
            "world_size": dist.get_world_size(),
            "torch": torch.__version__,
            "loader": self._merge(loader_state),
            "extra": dict(extra),
        }
        if self._config.background:
            self._pending = self._writer.submit(self._write, step, copy_to_host(tensors), document, best)
        else:
            self._write(step, tensors, document, best)
        self._last_step = step
        return True

    def wait(self) -> None:
        """Return when no save is under way; raises `RunError` if the last one failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._last_step, step = None, self._last_step
            pending.result()
            self._last_step = step

    def load(self, path: Path, engine: Engine) -> dict[str, Any]:
        """Fill `engine` and this rank's random generators; returns what `state.json` holds.

        Generators of ranks that the saved run did not have keep their state.

        Raises:
            ConfigError: no checkpoint, or one of another model; nothing has been changed then.
            RunError: the checkpoint is damaged or refused.
        """
        document = self._on_main(lambda: read_state(path))
        tensors = engine.state_dict()
        shapes: list[dict[str, torch.Size]] = [{} for _ in range(dist.get_world_size())]
        own = {name: value.shape for name, value in tensors.items()}
        dist.all_gather_object(shapes, own, group=self._group)
        wanted = {name: shape for part in shapes for name, shape in part.items()}
        self._on_main(lambda: self._check_model(path, document, wanted))
        prefix = f"rng.{self._rank}."
        states = {
            name: torch.empty(shape, dtype=torch.uint8)
            for name, shape in tensor_shapes(path).items()
            if name.startswith(prefix)
        }
        reader = RestrictedReader(path)
        try:
            load_tensors(tensors | states, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise RunError(f"{path} cannot be read: {reason(error)}") from error
        engine.load_state_dict(tensors)
        if states:
            rng.restore({name.removeprefix(prefix): state for name, state in states.items()})
        self._last_step = document["step"]
        return document

    def close(self) -> None:
        """Finish the save under way, then let go of the directory."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._lock is not None:
                self._lock.release()

    def _open(self) -> None:
        self._lock = RunLock(self._files.run_dir)
        self._files.remove_incomplete()
        newest, resume = self._files.newest(), self._config.resume
        if resume == "auto" or (newest is None and resume == "never"):
            return
        if resume == "never":
            raise ConfigError(
                f"checkpoint.resume=never, but {newest} exists; choose another directory with out="
            )
        path = Path(resume)
        if newest is None and not is_complete(path):
            raise ConfigError(f"checkpoint.resume={resume} is not a complete checkpoint")

    def _write(self, step: int, tensors: dict[str, Any], document: dict[str, Any], best: bool) -> None:
        try:
            sums, failure = write_tensors(self._files.incomplete(step), tensors, self._group)
        except RuntimeError as error:
            raise RunError(f"checkpoint of step {step}: lost a rank ({lost_rank(error) or error})") from error

        def publish() -> None:
            if failure is None:
                self._files.publish(step, document, sums, self._config.keep, best=best)
            else:
                self._files.discard(step, failure)

        self._on_main(publish)

    def _check_model(self, path: Path, document: Mapping[str, Any], wanted: Mapping[str, torch.Size]) -> None:
        stored = {name: shape for name, shape in tensor_shapes(path).items() if not name.startswith("rng.")}
        problems = differences(stored, wanted)
        if not problems and document["fingerprint"] != self._fingerprint:
            problems = "its fingerprint differs"
        if problems:
            raise ConfigError(f"{path} is of another model: {problems}")

    def _merge(self, loader_state: Mapping[str, Any]) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, dict(loader_state), group=self._group)
        return {stream: state for part in parts for stream, state in part.items()}

    def _on_main(self, work: Callable[[], T]) -> T:
        """What rank 0 gets from `work`, on every rank; a failure there is raised everywhere."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = work()
            except CantataError as error:
                outcome[1] = error
            except OSError as error:
                outcome[1] = RunError(f"{error.filename or self._files.run_dir}: {error.strerror or error}")
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result
