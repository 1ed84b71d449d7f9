"""What a run leaves in `experts/`, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cantata.core.errors import RunError
from cantata.train.expert_counts import ExpertCounts, ExpertInterval
from cantata.train.expert_report import ExpertFolder, ExpertReport, dead_experts
from cantata.train.loop import StepResult
from tests.train.test_window import result

SHAPE = (2, 3, 4)


def finished(step: int, tokens_LME: torch.Tensor) -> StepResult:
    return replace(result(step), sums={"tokens_per_expert_LME": tokens_LME.double()})


def tokens(step: int, image: bool = True) -> torch.Tensor:
    tokens_LME = torch.full(SHAPE, step)
    tokens_LME[:, 2] = 0
    if not image:
        tokens_LME[:, 1] = 0
    return tokens_LME


def folder(out: Path, resume_step: int | None = None) -> ExpertFolder:
    return ExpertFolder(out, SHAPE, 2, "run", resume_step)


def report(to: ExpertFolder | None, every: int, max_steps: int) -> tuple[ExpertReport, list[str]]:
    said: list[str] = []
    return ExpertReport(ExpertInterval(), to, every=every, max_steps=max_steps, warn=said.append), said


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5]), (0, [])])
def test_entries_come_every_so_many_steps_and_after_the_last(
    tmp_path: Path, every: int, steps: list[int]
) -> None:
    listener, said = report(folder(tmp_path), every, max_steps=5)
    for step in range(1, 6):
        listener.after_step(finished(step, tokens(step)))
    entries = np.load(tmp_path / "counts.npy")
    assert entries["last_step"].tolist() == steps
    if steps:
        assert (
            entries["tokens_per_expert"].sum(0) == sum(tokens(step) for step in range(1, 6)).numpy()
        ).all()
    assert said == []


def test_each_modality_with_tokens_has_its_picture_of_the_last_interval(tmp_path: Path) -> None:
    listener, _ = report(folder(tmp_path), 1, max_steps=9)
    listener.after_step(finished(1, tokens(1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.npy", "image.png", "text.png"]
    before = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("text", "image")}
    listener.after_step(finished(2, tokens(2, image=False)))
    assert (tmp_path / "text.png").read_bytes() != before["text"]
    assert (tmp_path / "image.png").read_bytes() == before["image"], "no image came: its picture stays"


def test_only_a_run_from_scratch_clears_the_pictures(tmp_path: Path) -> None:
    report(folder(tmp_path), 1, max_steps=1)[0].after_step(finished(1, tokens(1)))
    folder(tmp_path, resume_step=1)
    assert (tmp_path / "text.png").exists()
    folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.npy"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "experts").write_text("a file")
    with pytest.raises(RunError, match="experts: cannot keep expert counts: File exists"):
        folder(tmp_path / "experts")


def test_other_ranks_write_and_say_nothing(tmp_path: Path) -> None:
    listener, said = report(None, 1, max_steps=2)
    collapsed_LME = torch.zeros(SHAPE)
    collapsed_LME[:, 0, 1] = 7
    listener.after_step(finished(1, collapsed_LME))
    assert list(tmp_path.iterdir()) == []
    assert said == []


def test_a_collapsed_layer_is_named_once(tmp_path: Path) -> None:
    listener, said = report(folder(tmp_path), 2, max_steps=6)
    collapsed_LME = tokens(1)
    collapsed_LME[1, :, :3] = 0
    listener.after_step(finished(1, collapsed_LME))
    assert said == [], "the interval is not over"
    for step in (2, 3, 4):
        listener.after_step(finished(step, collapsed_LME))
    assert len(said) == 1
    assert said[0].startswith("layer 1: 3 of 4 experts got no token in steps 1 to 2: routing collapses; ")


def test_half_of_the_experts_is_where_a_layer_counts_as_collapsed() -> None:
    tokens_LME = tokens(5)
    tokens_LME[0, :, 0] = 0
    assert dead_experts(ExpertCounts(3, 3, tokens_LME)) is None
    tokens_LME[:, :, 1] = 0
    assert dead_experts(ExpertCounts(3, 3, tokens_LME)) is not None
    tokens_LME[1, :, 2:] = 0
    text = dead_experts(ExpertCounts(3, 3, tokens_LME))
    assert text is not None
    assert "layer 1: 3 of 4 experts got no token in step 3 (1 more layers" in text
