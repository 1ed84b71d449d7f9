"""Pictures of the load: every cell's colour against its number, and labels that have room."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from cantata.train.expert_maps import DEAD, PAPER, SILENT, STOPS, colour_of, grid_of, heat_map, stride


def pixel(picture: Image.Image, row: int, column: int, shape: tuple[int, int]) -> tuple[int, ...]:
    """The colour just inside the middle of a cell's top edge."""
    left, top, right, _ = grid_of(*shape).box(row, column)
    colour = picture.getpixel(((left + right) // 2, top))
    assert isinstance(colour, tuple)
    return colour


@pytest.mark.parametrize("shape", [(2, 4), (3, 16), (28, 64), (5, 300)])
def test_every_cell_has_the_colour_of_its_load(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_LE = torch.randint(1, 100, shape, generator=generator)
    others_LE = torch.randint(1, 100, shape, generator=generator)
    tokens_LE[1, 2] = tokens_LE[0, 3] = others_LE[0, 3] = 0
    picture = heat_map("image", tokens_LE, tokens_LE + others_LE, "run: steps 1 to 50")
    for row, counts in enumerate(tokens_LE.tolist()):
        for column, count in enumerate(counts):
            wanted = colour_of(count / (sum(counts) / len(counts))) if count else SILENT
            if (row, column) == (0, 3):
                wanted = DEAD
            assert pixel(picture, row, column, shape) == wanted, (row, column)


def test_a_dead_expert_is_crossed_out() -> None:
    tokens_LE = torch.tensor([[0, 5, 5]])
    grid = grid_of(1, 3)
    alive = heat_map("text", tokens_LE, torch.tensor([[1, 5, 5]]), "")
    dead = heat_map("text", tokens_LE, tokens_LE, "")
    left, top, right, bottom = grid.box(0, 0)
    assert {dead.getpixel((left, top)), dead.getpixel((right, bottom))} != {DEAD}
    colours = {p.crop((left, top, right, bottom)).getcolors()[0][1] for p in (alive, dead)}  # type: ignore[index]
    assert len(colours) == 2


def test_the_colours_run_from_a_quarter_over_even_to_four_times() -> None:
    assert [colour_of(load) for load in (0.25, 0.5, 1, 2, 4)] == list(STOPS)
    assert (colour_of(0.001), colour_of(1000.0)) == (STOPS[0], STOPS[-1])
    assert colour_of(math.sqrt(2)) not in STOPS


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (28, 64), (64, 512)])
def test_everything_lies_inside_the_picture(shape: tuple[int, int]) -> None:
    ones_LE, grid = torch.ones(shape, dtype=torch.int64), grid_of(*shape)
    picture = heat_map("video", ones_LE, ones_LE, "a caption that is much longer than the grid " * 3)
    assert picture.width >= grid.right
    assert picture.height > grid.bottom
    border = [picture.crop(box) for box in ((0, 0, picture.width, 8), (0, 0, 8, picture.height))]
    border.append(picture.crop((picture.width - 8, 0, picture.width, picture.height)))
    border.append(picture.crop((0, picture.height - 8, picture.width, picture.height)))
    assert all(part.getcolors() == [(part.width * part.height, PAPER)] for part in border)


def test_labels_never_touch() -> None:
    assert [stride(64, cell, 26) for cell in (44, 16, 12, 6)] == [1, 2, 4, 5]
    assert stride(3000, 1, 26) == 32
