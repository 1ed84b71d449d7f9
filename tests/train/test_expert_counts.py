"""The array of counts: what numpy loads, and what a stopped run leaves and goes on with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cantata.core.errors import RunError
from cantata.train.expert_counts import CountsFile, ExpertInterval

SHAPE = (2, 3, 4)
EVERY = 3


def tokens(step: int) -> torch.Tensor:
    """A step's counts as listeners get them: whole numbers in fp64."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 2**40, SHAPE, generator=generator).double()


class Run:
    """Steps with an entry every third one; a checkpoint is the interval's state as JSON."""

    def __init__(self, path: Path, checkpoint: tuple[int, str] | None = None) -> None:
        self.step, state = (0, "{}") if checkpoint is None else checkpoint
        self.interval = ExpertInterval()
        self.interval.load_state_dict(json.loads(state))
        self.file = CountsFile(path, SHAPE, self.step or None)

    def to(self, step: int) -> tuple[int, str]:
        while self.step < step:
            self.step += 1
            self.interval.add(self.step, tokens(self.step))
            if self.step % EVERY == 0:
                self.file.write(self.interval.take())
        return step, json.dumps(self.interval.state_dict())


def check(path: Path, last: int) -> None:
    """The file against sums written out step by step."""
    entries = np.load(path)
    assert entries["last_step"].tolist() == list(range(EVERY, last + 1, EVERY))
    for entry in entries:
        wanted = np.zeros(SHAPE, np.int64)
        for step in range(entry["first_step"], entry["last_step"] + 1):
            wanted += tokens(step).numpy().astype(np.int64)
        assert (entry["tokens_per_expert"] == wanted).all()
    assert entries["first_step"].tolist() == [step - EVERY + 1 for step in entries["last_step"]]


def test_numpy_loads_it_in_one_line_at_any_time(tmp_path: Path) -> None:
    run = Run(tmp_path / "counts.npy")
    assert np.load(tmp_path / "counts.npy").shape == (0,)
    run.to(10)
    counts = np.load(tmp_path / "counts.npy")["tokens_per_expert"]
    assert counts.shape == (3, *SHAPE)
    assert counts.dtype == np.int64
    check(tmp_path / "counts.npy", 10)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=4))
def test_runs_that_stop_anywhere_leave_no_gap_and_no_repeat(
    tmp_path_factory: pytest.TempPathFactory, stops: list[tuple[int, int]]
) -> None:
    """Each stop: steps to the next checkpoint, and steps that are lost after it."""
    path = tmp_path_factory.mktemp("run") / "counts.npy"
    checkpoint = None
    for steps, lost in stops:
        run = Run(path, checkpoint)
        checkpoint = run.to(run.step + steps) if run.step + steps else None
        run.to(run.step + lost)
    Run(path, checkpoint).to(30)
    check(path, 30)


def test_a_write_cut_at_any_byte_is_as_if_it_never_was(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npy"
    run = Run(whole)
    checkpoint = run.to(8)
    before = whole.read_bytes()
    run.to(9)
    appended = whole.read_bytes()[len(before) :]
    for size in (1, 7, len(appended) - 1, len(appended)):
        # The header counts an entry only once all of it is there.
        cut.write_bytes(before + appended[:size])
        assert len(np.load(cut)) == 2
        Run(cut, checkpoint).to(12)
        check(cut, 12)


def test_a_run_from_scratch_starts_an_empty_file(tmp_path: Path) -> None:
    Run(tmp_path / "counts.npy").to(9)
    assert len(np.load(tmp_path / "counts.npy")) == 3
    Run(tmp_path / "counts.npy").to(3)
    check(tmp_path / "counts.npy", 3)


@pytest.mark.parametrize("content", [b"hello", random.Random(0).randbytes(500)])
def test_a_file_that_is_no_array_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "counts.npy"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"counts\.npy cannot be continued .*; move it away"):
        CountsFile(path, SHAPE, resume_step=3)
    assert path.read_bytes() == content


def test_counts_of_another_model_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "counts.npy"
    CountsFile(path, (1, 3, 4), None).close()
    with pytest.raises(RunError, match="holds other counts than this model's; move it away"):
        CountsFile(path, SHAPE, resume_step=3)


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    run = Run(tmp_path / "counts.npy")
    with (
        open("/dev/full", "wb", buffering=0) as run.file._file,
        pytest.raises(RunError, match=r"counts\.npy: cannot write expert counts: No space left"),
    ):
        run.to(3)
