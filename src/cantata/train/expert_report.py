"""`<out>/experts`: counts over the run and a picture of the load by modality; a word on dead experts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cantata.core.errors import RunError
from cantata.core.types import MODALITIES
from cantata.train import humane
from cantata.train.expert_counts import CountsFile, ExpertCounts, ExpertInterval
from cantata.train.expert_maps import heat_map
from cantata.train.loop import StepResult

COLLAPSED = 0.5
"""Share of dead experts from which on a layer is called collapsed."""


class ExpertFolder:
    """`counts.npy` and `<modality>.png`, written by rank 0 alone.

    Args:
        path: the folder; made where it is missing.
        shape: (L, M, E).
        top_k: experts that each token chooses.
        name: of the run, for the pictures.
        resume_step: the step that the run goes on from; None clears what an earlier run left.

    Raises:
        RunError: an existing file cannot be continued, or the disk refuses.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], top_k: int, name: str, resume_step: int | None
    ) -> None:
        self._path = path
        self._top_k = top_k
        self._name = name
        try:
            path.mkdir(exist_ok=True)
            if resume_step is None:
                for modality in MODALITIES:
                    self._picture(modality).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{error.filename}: cannot keep expert counts: {error.strerror}") from error
        self._file = CountsFile(path / "counts.npy", shape, resume_step)

    def write(self, counts: ExpertCounts) -> None:
        """Append to the array, then draw the interval; a modality without tokens keeps its last picture."""
        self._file.write(counts)
        for index, modality in enumerate(MODALITIES):
            if counts.tokens_per_expert_LME[:, index].any():
                self._draw(modality, index, counts)

    def close(self) -> None:
        self._file.close()

    def _picture(self, modality: str) -> Path:
        return self._path / f"{modality}.png"

    def _draw(self, modality: str, index: int, counts: ExpertCounts) -> None:
        tokens_LE = counts.tokens_per_expert_LME[:, index]
        tokens = humane.count(tokens_LE[0].sum().item() / self._top_k)
        caption = f"{self._name}: {_steps(counts)}, {tokens} {modality} tokens"
        picture = heat_map(modality, tokens_LE, counts.tokens_per_expert_LME.sum(1), caption)
        path = self._picture(modality)
        beside = path.with_name(path.name + ".incomplete")
        try:
            picture.save(beside, "PNG")
            os.replace(beside, path)
        except OSError as error:
            raise RunError(f"{path}: cannot write the picture: {error.strerror or error}") from error


class ExpertReport:
    """A listener that closes the interval every `every` steps and after the last one.

    It must hear of a step before the checkpoint is written, which keeps the unfinished interval.

    Args:
        interval: filled here; part of every checkpoint.
        folder: where entries go; None on ranks other than 0, which write and warn of nothing.
        every: steps between two entries; 0: never.
        warn: shows a line to the user.
    """

    def __init__(
        self,
        interval: ExpertInterval,
        folder: ExpertFolder | None,
        *,
        every: int,
        max_steps: int,
        warn: Callable[[str], None],
    ) -> None:
        self._interval = interval
        self._folder = folder
        self._every = every
        self._max_steps = max_steps
        self._warn = warn
        self._warned = False

    def after_step(self, result: StepResult) -> None:
        step = result.progress.step
        self._interval.add(step, result.sums["tokens_per_expert_LME"])
        if not self._every or (step % self._every and step != self._max_steps):
            return
        counts = self._interval.take()
        if self._folder is not None:
            self._folder.write(counts)
            self._warn_once(counts)

    def _warn_once(self, counts: ExpertCounts) -> None:
        text = dead_experts(counts)
        if text is not None and not self._warned:
            self._warned = True
            self._warn(text)


def dead_experts(counts: ExpertCounts) -> str | None:
    """A line on the layer with the most experts without a token, where at least half of them have none."""
    dead_LE = counts.tokens_per_expert_LME.sum(1) == 0
    dead_L, num_experts = dead_LE.sum(1), dead_LE.shape[1]
    collapsed = int((dead_L >= COLLAPSED * num_experts).sum())
    if not collapsed:
        return None
    layer = int(dead_L.argmax())
    more = f" ({collapsed - 1} more layers with half of theirs)" if collapsed > 1 else ""
    return (
        f"layer {layer}: {int(dead_L[layer])} of {num_experts} experts got no token in {_steps(counts)}"
        f"{more}: routing collapses; raise the balance's aux_loss_coef or bias_update_rate"
    )


def _steps(counts: ExpertCounts) -> str:
    if counts.first_step == counts.last_step:
        return f"step {counts.last_step}"
    return f"steps {counts.first_step} to {counts.last_step}"
