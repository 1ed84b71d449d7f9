"""A contact sheet of pages as the vision tower gets them: each whole, beside it its crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from cantata.core.errors import ConfigError
from cantata.core.samples import ImagePatches, Sample
from cantata.infer.pdf import Budget, PageCost
from cantata.models.aria.processor import AriaProcessor
from cantata.models.aria.reading import split_grid

_PAPER, _CELL, _INK = (150, 150, 150), (215, 215, 215), (20, 20, 20)
_SPACING, _GAP, _LABEL = 16, 4, 24
"""Pixels between pages, between crops, and of the line above a page."""


@dataclass(frozen=True)
class GalleryConfig:
    """How pages are laid out."""

    columns: int
    """Pages beside each other."""
    page_side: int
    """Pixels of a page's longest side, whole and as crops."""

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ConfigError(f"gallery.columns={self.columns} must be at least 1")
        if self.page_side < 32:
            raise ConfigError(f"gallery.page_side={self.page_side} must be at least 32")


def gallery(sample: Sample, budget: Budget, processor: AriaProcessor, config: GalleryConfig) -> Image.Image:
    """The pages of an encoded prompt, with their numbers and tokens.

    Args:
        sample: the prompt; pages are the last of its images.
        budget: of the same prompt.
    """
    start = len(sample.images) - sum(page.crops for page in budget.pages)
    cells = []
    for page in budget.pages:
        cells.append(_cell(page, sample.images[start : start + page.crops], processor, config.page_side))
        start += page.crops
    return _sheet(cells, config.columns)


def _sheet(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    size = (columns * (width + _SPACING) + _SPACING, rows * (height + _SPACING) + _SPACING)
    sheet = Image.new("RGB", size, _PAPER)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        sheet.paste(cell, (_SPACING + column * (width + _SPACING), _SPACING + row * (height + _SPACING)))
    return sheet


def _cell(
    page: PageCost, images: Sequence[ImagePatches], processor: AriaProcessor, page_side: int
) -> Image.Image:
    whole = processor.picture(images[0])
    whole.thumbnail((page_side, page_side))
    pictures = [(whole, (0, 0))]
    grid = split_grid(processor, page.width, page.height)
    if grid is not None:
        across, _ = grid
        side = page_side // max(grid)
        for index, image in enumerate(images[1:]):
            row, column = divmod(index, across)
            corner = (whole.width + _GAP + column * (side + _GAP), row * (side + _GAP))
            pictures.append((processor.picture(image).resize((side, side)), corner))
    label = f"Page {page.number}   {page.crops} crop{'s' if page.crops > 1 else ''}   {page.tokens:,} tokens"
    font = ImageFont.load_default(size=14)
    width = max(int(font.getlength(label)), *(x + picture.width for picture, (x, _) in pictures))
    height = max(y + picture.height for picture, (_, y) in pictures)
    cell = Image.new("RGB", (width + 2 * _GAP, height + _LABEL + _GAP), _CELL)
    ImageDraw.Draw(cell).text((_GAP, _GAP), label, fill=_INK, font=font)
    for picture, (x, y) in pictures:
        cell.paste(picture, (_GAP + x, _LABEL + y))
    return cell
