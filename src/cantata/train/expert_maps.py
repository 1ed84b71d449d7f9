"""Pictures of the experts' load: layers down, experts across, a colour for the load over the ideal.

Shape suffixes as in `cantata.core.types`: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

STOPS: tuple[Colour, ...] = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))
"""Blue for a quarter of the ideal or less, white for the ideal, red for four times or more, equal steps of
the logarithm between: readable to the colour-blind, and the same for every picture, so that two compare."""
RANGE = 4.0
SILENT: Colour = (70, 70, 70)
"""An expert without a token of this modality, which serves another."""
DEAD: Colour = (0, 0, 0)
"""An expert without any token at all, crossed out."""
CROSS: Colour = (255, 221, 87)
PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 40, 40)
FAINT: Colour = (120, 120, 120)

MARGIN, GAP = 24, 1
TITLE_SIZE, TEXT_SIZE = 20, 13
LARGEST_CELL, SMALLEST_CELL = 44, 6
NUMBERED_CELL = 30
"""Side from which on a cell holds its number."""
GRID_WIDTH = 1024
LEGEND_WIDTH, LEGEND_HEIGHT = 260, 14


class Grid(NamedTuple):
    """Where the cells are, in pixels."""

    left: int
    top: int
    cell: int
    rows: int
    columns: int

    @property
    def right(self) -> int:
        return self.left + self.columns * self.cell

    @property
    def bottom(self) -> int:
        return self.top + self.rows * self.cell

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """First and last pixel of a cell; the gap lies right and below."""
        x, y = self.left + column * self.cell, self.top + row * self.cell
        return x, y, x + self.cell - 1 - GAP, y + self.cell - 1 - GAP


def grid_of(num_layers: int, num_experts: int) -> Grid:
    """The largest square cells that keep the picture about a screen wide."""
    cell = min(LARGEST_CELL, max(SMALLEST_CELL, GRID_WIDTH // num_experts))
    return Grid(MARGIN + 30, MARGIN + 78, cell, num_layers, num_experts)


def colour_of(load: float) -> Colour:
    """The colour of a load over the ideal above 0."""
    place = (math.log(load, RANGE) + 1) / 2 * (len(STOPS) - 1)
    place = min(max(place, 0.0), len(STOPS) - 1.0)
    index = min(int(place), len(STOPS) - 2)
    share = place - index
    red, green, blue = (
        round(low + share * (high - low)) for low, high in zip(STOPS[index], STOPS[index + 1], strict=True)
    )
    return red, green, blue


def heat_map(modality: str, tokens_LE: Tensor, all_tokens_LE: Tensor, caption: str) -> Image.Image:
    """The load of every expert by the tokens of one modality.

    Args:
        tokens_LE: counts of that modality; each layer has at least one.
        all_tokens_LE: counts of all modalities, which tell the dead from those that serve others.
        caption: a line below the title.
    """
    grid = grid_of(*tokens_LE.shape)
    load_LE = (tokens_LE / tokens_LE.double().mean(1, keepdim=True)).tolist()
    dead_LE = (all_tokens_LE == 0).tolist()
    title = f"{modality} tokens: load of each expert over the ideal"
    width = _width(grid, title, caption)
    picture = Image.new("RGB", (width, grid.bottom + 110), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE_SIZE))
    draw.text((MARGIN, MARGIN + 30), caption, FAINT, _font(TEXT_SIZE))
    for row in range(grid.rows):
        for column in range(grid.columns):
            _cell(draw, grid, row, column, load_LE[row][column], dead_LE[row][column])
    _axes(draw, grid)
    _legend(draw, grid.bottom + 56, modality)
    return picture


def _cell(draw: ImageDraw.ImageDraw, grid: Grid, row: int, column: int, load: float, dead: bool) -> None:
    left, top, right, bottom = box = grid.box(row, column)
    if dead:
        draw.rectangle(box, DEAD)
        draw.line((left, top, right, bottom), CROSS)
        draw.line((left, bottom, right, top), CROSS)
        return
    fill = colour_of(load) if load else SILENT
    draw.rectangle(box, fill)
    if load and grid.cell >= NUMBERED_CELL:
        ink = PAPER if sum(fill) < 360 else INK
        text = f"{load:.1f}" if load < 9.95 else f"{load:.0f}"
        draw.text(((left + right) / 2, (top + bottom) / 2), text, ink, _font(TEXT_SIZE - 1), anchor="mm")


def _axes(draw: ImageDraw.ImageDraw, grid: Grid) -> None:
    font = _font(TEXT_SIZE)
    draw.text((grid.left - 8, grid.top - 8), "layer", FAINT, font, anchor="rb")
    for row in range(0, grid.rows, stride(grid.rows, grid.cell, TEXT_SIZE + 3)):
        middle = grid.top + (row + 0.5) * grid.cell
        draw.text((grid.left - 8, middle), str(row), INK, font, anchor="rm")
    for column in range(0, grid.columns, stride(grid.columns, grid.cell, 2 * TEXT_SIZE)):
        middle = grid.left + (column + 0.5) * grid.cell
        draw.text((middle, grid.bottom + 6), str(column), INK, font, anchor="mt")
    draw.text((grid.left, grid.bottom + 24), "expert", FAINT, font, anchor="lt")


def stride(number: int, cell: int, room: int) -> int:
    """Every how manieth of `number` labels to write, so that each has `room` pixels."""
    return next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64) if step * cell >= room), number)


def _legend(draw: ImageDraw.ImageDraw, top: int, modality: str) -> None:
    font, bottom = _font(TEXT_SIZE), top + LEGEND_HEIGHT
    for x in range(LEGEND_WIDTH):
        load = RANGE ** (2 * x / (LEGEND_WIDTH - 1) - 1)
        draw.line((MARGIN + x, top, MARGIN + x, bottom), colour_of(load))
    draw.rectangle((MARGIN, top, MARGIN + LEGEND_WIDTH - 1, bottom), outline=FAINT)
    for place, text in enumerate(("<1/4", "1/2", "1", "2", ">4")):
        anchor = "lt" if place == 0 else "rt" if place == 4 else "mt"
        draw.text((MARGIN + place * (LEGEND_WIDTH - 1) / 4, bottom + 6), text, INK, font, anchor=anchor)
    left = MARGIN + LEGEND_WIDTH + 28
    for row, (dead, text) in enumerate(((False, f"no {modality} token"), (True, "dead: no token at all"))):
        box = (left, top - 4 + 22 * row, left + 15, top + 11 + 22 * row)
        draw.rectangle(box, DEAD if dead else SILENT)
        if dead:
            draw.line(box, CROSS)
            draw.line((box[0], box[3], box[2], box[1]), CROSS)
        draw.text((left + 24, top + 4 + 22 * row), text, INK, font, anchor="lm")


def _width(grid: Grid, title: str, caption: str) -> int:
    legend = MARGIN + LEGEND_WIDTH + 28 + 24 + 140
    texts = [_font(TITLE_SIZE).getlength(title), _font(TEXT_SIZE).getlength(caption)]
    return max(grid.right, legend, *(MARGIN + math.ceil(length) for length in texts)) + MARGIN


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: no file of the system is needed."""
    return ImageFont.load_default(size)
