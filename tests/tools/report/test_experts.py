"""Heat maps of the experts' load."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cantata.tools.report.experts import CELL, FRAMES, Experts, read_experts, spread
from cantata.train.expert_maps import CROSS, DEAD, SILENT, colour_of
from tests.tools.report.runs import EXPERTS, LAYERS, make_counts


def pixels(url: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)


def test_each_modality_that_was_heard_has_a_map(tmp_path: Path) -> None:
    make_counts(tmp_path / "counts.npy", steps=12)
    found = read_experts(tmp_path / "counts.npy")
    assert [(one.modality, one.layers, one.experts) for one in found.maps] == [
        ("text", 3, 8),
        ("image", 3, 8),
    ]
    text = found.maps[0].frames
    assert [(frame.first_step, frame.last_step, frame.dead) for frame in text] == [(1, 6, 1), (7, 12, 1)]
    loads = np.array(text[-1].loads.split(","), int).reshape(LAYERS, EXPERTS)
    # Six of eight experts share layer 0: each has 8 / 6 of the ideal.
    assert loads[0].tolist() == [-1, 0, *[133] * 6]
    assert (loads[1:] == 100).all()


def test_cells_have_the_colours_of_the_runs_own_pictures(tmp_path: Path) -> None:
    make_counts(tmp_path / "counts.npy", steps=12)
    shown = pixels(read_experts(tmp_path / "counts.npy").maps[0].frames[0].picture)
    assert shown.shape == (LAYERS * CELL, EXPERTS * CELL, 4)

    def at(layer: int, expert: int, right: int = 1) -> tuple[int, ...]:
        return tuple(shown[layer * CELL, expert * CELL + right].tolist())

    assert at(0, 0) == (*DEAD, 255)
    assert at(0, 0, right=0) == at(0, 0, right=CELL - 2) == (*CROSS, 255)
    assert at(0, 1) == (*SILENT, 255)
    assert at(0, 2) == (*colour_of(8 / 6), 255)
    assert at(1, 0) == (*colour_of(1.0), 255)
    assert at(1, 0, right=CELL - 1)[3] == 0, "gaps take the page's colour"


def test_many_intervals_are_thinned(tmp_path: Path) -> None:
    make_counts(tmp_path / "counts.npy", steps=300, intervals=100)
    found = read_experts(tmp_path / "counts.npy")
    assert found.intervals == 100
    frames = found.maps[0].frames
    assert (len(frames), frames[0].first_step, frames[-1].last_step) == (FRAMES, 1, 300)


def test_spread_is_even_with_both_ends() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [0, 33, 66, 99]
    assert spread(0, 4) == []


@pytest.mark.parametrize("content", [b"", b"not numpy", "old"])
def test_a_file_of_something_else_is_told(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "counts.npy"
    if content == "old":
        np.save(path, np.zeros((2, 3)))
    else:
        path.write_bytes(content)
    found = read_experts(path)
    assert found.maps == []
    assert f"{path} cannot be read" in found.problem
    assert read_experts(tmp_path / "none.npy") == Experts([], 0)
