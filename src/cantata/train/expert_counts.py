"""The tokens of every expert over the run, an array that numpy loads.

`experts/counts.npy` has one entry an interval:

    counts = numpy.load("experts/counts.npy")
    counts["tokens_per_expert"]                   (intervals, L, M, E), int64; M as in `core.types.MODALITIES`
    counts["first_step"], counts["last_step"]     the steps that an entry speaks for, both included

Shape suffixes as in `cantata.core.types`: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from cantata.core.errors import RunError


class ExpertCounts(NamedTuple):
    """What an interval counted: all tokens of all ranks, without padding, evaluation and recomputation."""

    first_step: int
    last_step: int
    tokens_per_expert_LME: Tensor
    """int64 on the host."""


class ExpertInterval:
    """The steps since the last entry.

    A checkpoint that falls inside an interval keeps `state_dict()`, so that a resumed run writes the same
    entries as one that was never stopped.
    """

    def __init__(self) -> None:
        self._counts: ExpertCounts | None = None

    def add(self, step: int, tokens_per_expert_LME: Tensor) -> None:
        """Take a finished step's counts; whole numbers, in a floating type up to 2^53."""
        tokens_LME = tokens_per_expert_LME.to(torch.int64)
        if self._counts is None:
            self._counts = ExpertCounts(step, step, tokens_LME)
        else:
            first_step, _, before_LME = self._counts
            self._counts = ExpertCounts(first_step, step, before_LME + tokens_LME)

    def take(self) -> ExpertCounts:
        """What was counted, at least one step; the next interval starts."""
        assert self._counts is not None
        counts, self._counts = self._counts, None
        return counts

    def state_dict(self) -> dict[str, Any]:
        """The unfinished interval as plain JSON values; empty between two."""
        if self._counts is None:
            return {}
        return self._counts._asdict() | {"tokens_per_expert_LME": self._counts.tokens_per_expert_LME.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = None
        if state:
            tokens_LME = torch.tensor(state["tokens_per_expert_LME"], dtype=torch.int64)
            self._counts = ExpertCounts(state["first_step"], state["last_step"], tokens_LME)


class CountsFile:
    """`counts.npy`, written by rank 0 alone.

    An entry is appended before the header counts it, so a reader, and a killed process, finds whole entries.
    A run that resumes at step k first drops what lies after k, so the file goes on without gap or repeat -
    provided that a step's entry is written before its checkpoint.

    Args:
        path: the file; its directory exists.
        shape: (L, M, E).
        resume_step: keep entries up to this step; None starts an empty file.

    Raises:
        RunError: an existing file holds other counts than this model's, or the disk refuses.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], resume_step: int | None) -> None:
        self.path = path
        self._dtype = np.dtype(
            [("first_step", "<i8"), ("last_step", "<i8"), ("tokens_per_expert", "<i8", shape)]
        )
        self._header_bytes = len(self._header(0))
        self._entries = 0 if resume_step is None else self._entries_until(resume_step)
        try:
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self._put(0, self._header(self._entries))
            self._file.truncate(self._end)
        except OSError as error:
            raise self._refused(error) from error

    def write(self, counts: ExpertCounts) -> None:
        """Append an entry."""
        entry = np.empty((), self._dtype)
        entry["first_step"], entry["last_step"] = counts.first_step, counts.last_step
        entry["tokens_per_expert"] = counts.tokens_per_expert_LME.numpy()
        try:
            self._put(self._end, entry.tobytes())
            self._put(0, self._header(self._entries + 1))
        except OSError as error:
            raise self._refused(error) from error
        self._entries += 1

    def close(self) -> None:
        self._file.close()

    @property
    def _end(self) -> int:
        return self._header_bytes + self._entries * self._dtype.itemsize

    def _header(self, entries: int) -> bytes:
        """numpy leaves room for the count to grow, so every header of a file is equally long."""
        stream = io.BytesIO()
        descr = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (entries,)}
        npy.write_array_header_1_0(stream, descr)
        return stream.getvalue()

    def _put(self, offset: int, data: bytes) -> None:
        if os.pwrite(self._file.fileno(), data, offset) != len(data):
            raise OSError(None, "the disk took only a part of an entry")

    def _entries_until(self, resume_step: int) -> int:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return 0
        try:
            found = np.load(self.path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise RunError(f"{self.path} cannot be continued ({error}); move it away") from error
        if found.dtype != self._dtype:
            raise RunError(f"{self.path} holds other counts than this model's; move it away")
        return int((found["last_step"] <= resume_step).sum())

    def _refused(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot write expert counts: {error.strerror}")
