"""The checkpoint directories of a run, as rank 0 handles them on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from cantata.core.errors import ConfigError, RunError
from cantata.train.checkpoint_sums import PARTS, SUMS, FileSum, as_json, is_summed

_COMPLETE = re.compile(r"step-(\d{8,})")
_SUFFIX, _DAMAGED = ".incomplete", ".damaged"
LATEST, BEST = "LATEST", "BEST"


def is_complete(path: Path) -> bool:
    """Whether `path` holds a checkpoint that was published (and has not been thinned out by hand)."""
    return path.suffix not in (_SUFFIX, _DAMAGED) and all((path / part).is_file() for part in PARTS)


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
        return [path for path in reversed(self.newest_first()) if is_complete(path)]

    def newest_first(self) -> list[Path]:
        """Everything that was published as a checkpoint, whatever has become of it since."""
        if not self._root.is_dir():
            return []
        found = {
            int(match[1]): path
            for path in self._root.iterdir()
            if (match := _COMPLETE.fullmatch(path.name)) and path.is_dir()
        }
        return [found[step] for step in sorted(found, reverse=True)]

    def newest(self) -> Path | None:
        found = self.complete()
        return found[-1] if found else None

    def remove_incomplete(self) -> None:
        """Clear what interrupted saves and removals left; only for the holder of the run's lock."""
        for path in self._root.glob(f"*{_SUFFIX}"):
            shutil.rmtree(path)

    def set_aside(self, damaged: Mapping[Path, str], sound: Path) -> list[str]:
        """Take damaged checkpoints out of the way of a run that goes on from `sound`; returns what to say.

        They are kept under another name, and nothing names them any more.
        """
        lines = []
        for path, problem in damaged.items():
            names = (f"{path.name}{_DAMAGED}{number or ''}" for number in count())
            aside = next(aside for name in names if not (aside := self._root / name).exists())
            path.rename(aside)
            _sync(self._root)
            if self.best() == path.name:
                (self.run_dir / BEST).unlink()
            lines.append(
                f"{path} is damaged ({problem}): it is kept as {aside.name}, and the run goes on from "
                f"{sound.name}"
            )
        if damaged:
            self._name(LATEST, sound)
        if not is_summed(sound):
            lines.append(f"{sound} was saved without checksums by an older version: damage would not be seen")
        return lines

    def best(self) -> str | None:
        """The name that `BEST` holds."""
        path = self.run_dir / BEST
        return path.read_text().strip() if path.is_file() else None

    def name_best(self, step: int) -> bool:
        """Write the name of a complete checkpoint into `BEST`; False where there is no such one."""
        path = self.published(step)
        if is_complete(path):
            self._name(BEST, path)
        return is_complete(path)

    def publish(
        self,
        step: int,
        state: Mapping[str, Any],
        sums: Mapping[str, FileSum],
        keep: int,
        *,
        best: bool = False,
    ) -> None:
        """Turn the written directory into a checkpoint, durably, then remove old ones.

        `sums` are those of its files so far. The `keep` newest stay, and the one named in `BEST`: this one
        where `best`.

        Raises:
            RunError: it could not be completed, or a checkpoint of this step is there already.
        """
        written = self.incomplete(step)
        final = self.published(step)
        if final.exists():
            self.discard(step, f"{final} exists already and is never overwritten")
        try:
            text = json.dumps(state, indent=1)
            _write_durably(written / "state.json", text)
            _write_durably(written / SUMS, as_json({**sums, "state.json": FileSum.of(text.encode())}))
            _sync(written)
            written.rename(final)
            _sync(self._root)
            self._name(LATEST, final)
            if best:
                self._name(BEST, final)
        except OSError as error:
            self.discard(step, f"{Path(error.filename or written).name}: {error.strerror or error}")
        best_name = self.best()
        for path in self.complete()[:-keep]:
            if path.name == best_name:
                continue
            # Half-removed must not look complete.
            doomed = path.with_name(path.name + _SUFFIX)
            path.rename(doomed)
            shutil.rmtree(doomed)

    def _name(self, file: str, checkpoint: Path) -> None:
        beside = self.run_dir / f"{file}.new"
        _write_durably(beside, checkpoint.name + "\n")
        beside.replace(self.run_dir / file)
        _sync(self.run_dir)

    def discard(self, step: int, reason: str) -> NoReturn:
        """Remove what was written of a failed save; always raises `RunError`."""
        written = self.incomplete(step)
        if written.exists():
            shutil.rmtree(written)
        newest = self.newest()
        left = f"the last complete one is {newest}" if newest else "there is no complete one yet"
        raise RunError(f"checkpoint of step {step} could not be written to {self._root}: {reason}; {left}")


def _write_durably(path: Path, text: str) -> None:
    try:
        with path.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
