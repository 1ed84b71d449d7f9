"""The checkpoint directories of a run, as rank 0 handles them on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from cantata.core.errors import ConfigError, RunError

_COMPLETE = re.compile(r"step-(\d{8,})")
_SUFFIX = ".incomplete"


def is_complete(path: Path) -> bool:
    """Whether `path` holds a checkpoint that was published (and has not been thinned out by hand)."""
    parts = (path / ".metadata", path / "state.json")
    return path.suffix != _SUFFIX and all(part.is_file() for part in parts)


def read_state(path: Path) -> dict[str, Any]:
    """What `state.json` holds.

    Raises:
        ConfigError: there is no complete checkpoint at `path`.
        RunError: the file is damaged.
    """
    if not is_complete(path):
        raise ConfigError(f"{path} is not a complete checkpoint")
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except ValueError as error:
        raise RunError(f"{path / 'state.json'} is damaged: {error}") from error
    return state


class CheckpointFiles:
    """Names, publishes and removes checkpoint directories."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._root = run_dir / "checkpoints"

    def incomplete(self, step: int) -> Path:
        """Where the checkpoint of `step` is written."""
        return self._root / f"step-{step:08d}{_SUFFIX}"

    def published(self, step: int) -> Path:
        """Where the complete checkpoint of `step` stands."""
        return self.incomplete(step).with_suffix("")

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self._root.is_dir():
            return []
        found = {
            int(match[1]): path
            for path in self._root.iterdir()
            if (match := _COMPLETE.fullmatch(path.name)) and is_complete(path)
        }
        return [found[step] for step in sorted(found)]

    def newest(self) -> Path | None:
        found = self.complete()
        return found[-1] if found else None

    def remove_incomplete(self) -> None:
        """Clear what interrupted saves and removals left; only for the holder of the run's lock."""
        for path in self._root.glob(f"*{_SUFFIX}"):
            shutil.rmtree(path)

    def publish(self, step: int, state: Mapping[str, Any], keep: int) -> None:
        """Turn the written directory into a checkpoint, durably, then remove all but the `keep` newest.

        Raises:
            RunError: it could not be completed, or a checkpoint of this step is there already.
        """
        written = self.incomplete(step)
        final = self.published(step)
        if final.exists():
            self.discard(step, f"{final} exists already and is never overwritten")
        try:
            _write_durably(written / "state.json", json.dumps(state, indent=1))
            _sync(written)
            written.rename(final)
            _sync(self._root)
            _write_durably(self.run_dir / "LATEST.new", final.name + "\n")
            (self.run_dir / "LATEST.new").replace(self.run_dir / "LATEST")
            _sync(self.run_dir)
        except OSError as error:
            self.discard(step, error.strerror or str(error))
        for path in self.complete()[:-keep]:
            # Half-removed must not look complete.
            doomed = path.with_name(path.name + _SUFFIX)
            path.rename(doomed)
            shutil.rmtree(doomed)

    def discard(self, step: int, reason: str) -> NoReturn:
        """Remove what was written of a failed save; always raises `RunError`."""
        written = self.incomplete(step)
        if written.exists():
            shutil.rmtree(written)
        newest = self.newest()
        left = f"the last complete one is {newest}" if newest else "there is no complete one yet"
        raise RunError(f"checkpoint of step {step} could not be written to {self._root}: {reason}; {left}")


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
