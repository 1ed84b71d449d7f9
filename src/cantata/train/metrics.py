"""Sums over ranks, and `metrics.jsonl`: what a run says of itself, one JSON object a logged step.

Shape suffixes as in `cantata.core.types`: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.errors import RunError
from cantata.core.types import MODALITIES

Record = dict[str, float | int | None]
"""A line of `metrics.jsonl`: `step`, then named values; None where there is none that is finite."""


PARTS = "parts/"
"""Prefix of the sums of a loss' terms, without their coefficients and on one basis, `target_weight_M`."""


class StepSums:
    """Adds up the objective's sums over micro-batches, then over ranks.

    Everything is held in fp64, so counts stay exact up to 2^53 and adding fp32 losses loses nothing that
    fp32 can see. Adding never waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add detached sums of any shape; a name keeps the shape of its first tensor."""
        for name, value in sums.items():
            value = value.detach().to(torch.float64)
            if name not in self._sums:
                self._sums[name] = value.clone()
                continue
            if value.shape != self._sums[name].shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)} after {tuple(self._sums[name].shape)}")
            self._sums[name] += value

    def reduced(self) -> dict[str, Tensor]:
        """The sums over all ranks, fp64 on the host: one collective and one wait for the device.

        Every rank must have added the same names and shapes, at least one.
        """
        names = sorted(self._sums)
        flat = torch.cat([self._sums[name].flatten() for name in names])
        if dist.is_initialized():
            dist.all_reduce(flat)
        parts = torch.split(flat.cpu(), [self._sums[name].numel() for name in names])
        return {name: part.view(self._sums[name].shape) for name, part in zip(names, parts, strict=True)}


def loss_metrics(sums: Mapping[str, Tensor], prefix: str = "") -> Record:
    """Cross entropy per target, weighted: `loss`, and `loss/<modality>` for each modality that has targets.

    `sums` are `NextToken`'s, reduced over ranks; training windows and held-out sets share this function.
    A target's modality is that of the sample it stands in. Without any target the loss is None.
    """
    weight_M, loss_sum_M = sums["target_weight_M"].tolist(), sums["loss_sum_M"].tolist()
    weight = sum(weight_M)
    record: Record = {f"{prefix}loss": sums["loss_sum"].item() / weight if weight else None}
    for modality, loss_sum, share in zip(MODALITIES, loss_sum_M, weight_M, strict=True):
        if share:
            record[f"{prefix}loss/{modality}"] = loss_sum / share
    return record


def part_metrics(sums: Mapping[str, Tensor], prefix: str = "") -> Record:
    """`loss/<term>` of each term that an objective names in `PARTS`, without its coefficient.

    Terms are means over the steps in `sums`, which are reduced over ranks; one that had not started counts
    as 0. `loss_metrics` gives the loss itself.
    """
    weight = sums["target_weight_M"].sum().item()
    return {
        f"{prefix}loss/{name.removeprefix(PARTS)}": value.item() / weight if weight else None
        for name, value in sums.items()
        if name.startswith(PARTS)
    }


def evaluation_metrics(sums: Mapping[str, Tensor]) -> Record:
    """`eval/loss`, `eval/loss/<modality>` and `eval/target_tokens` of a held-out pass over all ranks."""
    return {**loss_metrics(sums, "eval/"), "eval/target_tokens": int(sums["targets_M"].sum().item())}


class MetricsFile:
    """`metrics.jsonl`, written by rank 0 alone.

    A line reaches the kernel in one write, so a killed process leaves whole lines. A run that resumes at
    step k first drops what lies after k (and a cut last line), so the file goes on without gap or repeat -
    provided that a step's line is written before its checkpoint.

    Args:
        path: the file; its directory exists.
        resume_step: keep lines up to this step; None starts an empty file.

    Raises:
        RunError: a line in the middle of an existing file is not a metrics line, or the disk refuses.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        _keep_until(path, resume_step)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, float | int | None]) -> None:
        """Append one line; a value that is not finite becomes null, as JSON has no NaN."""
        values = {name: _json_value(value) for name, value in record.items()}
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise RunError(f"{self.path}: cannot write metrics: {error.strerror}") from error
        if written != len(line):
            raise RunError(f"{self.path}: cannot write metrics: the disk took only a part of a line")

    def close(self) -> None:
        self._file.close()


def _json_value(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def _keep_until(path: Path, resume_step: int | None) -> None:
    """Rewrite `path` without the lines after `resume_step` and without a cut last line."""
    if not path.exists():
        return
    old = path.read_bytes()
    kept = b"".join(_lines_until(path, old, resume_step)) if resume_step is not None else b""
    if kept == old:
        return
    beside = path.with_name(path.name + ".incomplete")
    with beside.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _lines_until(path: Path, text: bytes, resume_step: int) -> list[bytes]:
    kept = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise RunError(
                f"{path}:{number} is not a metrics line, so the file cannot be continued; remove that line"
            ) from error
        if step <= resume_step and line.endswith(b"\n"):
            kept.append(line)
    return kept
