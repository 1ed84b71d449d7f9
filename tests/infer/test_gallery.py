"""The contact sheet: its size, and pages and crops at their places."""

from __future__ import annotations

import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.data.media.pdf import PageSize
from cantata.infer.gallery import GalleryConfig, gallery
from cantata.infer.pdf import Limits, Question, example_of, measure, page_parts
from tests.data.helpers import mini_processor

RED, GREEN = (250, 10, 10), (10, 250, 10)
LABEL, GAP, SPACING = 24, 4, 16


def made(split_image: bool, count: int, columns: int, size: tuple[int, int] = (128, 256)) -> Image.Image:
    """Pages whose upper half is red and lower half green, behind an image that is no page."""
    processor = mini_processor(split_image=split_image)
    page = Image.new("RGB", size, RED)
    page.paste(GREEN, (0, size[1] // 2, *size))
    other = Image.new("RGB", (64, 64), "blue")
    asked = Question((other,), tuple(PageSize(i + 1, *size) for i in range(count)), "x", False)
    budget = measure(asked, processor, Limits(10**6, 10**6, 1))
    parts = (other, *page_parts((i + 1, page) for i in range(count)), "x")
    sample = processor.encode_prompt(example_of(parts, is_chat=False))
    return gallery(sample, budget, processor, GalleryConfig(columns=columns, page_side=512))


def near(pixel: object, colour: tuple[int, int, int]) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize(
    ("count", "columns", "rows", "across"), [(1, 3, 1, 1), (3, 3, 1, 3), (4, 3, 2, 3), (5, 2, 3, 2)]
)
def test_the_sheet_has_the_size_of_its_pages(count: int, columns: int, rows: int, across: int) -> None:
    # A page of 128 x 256 becomes a thumbnail of 64 x 64 (the least width) and 2 x 4 crops of 512 / 4 pixels.
    cell = (64 + GAP + 2 * 128 + GAP + 2 * GAP, 4 * 128 + 3 * GAP + LABEL + GAP)
    width = across * (cell[0] + SPACING) + SPACING
    assert made(True, count, columns).size == (width, rows * (cell[1] + SPACING) + SPACING)


def test_crops_stand_where_they_were_cut() -> None:
    sheet = made(True, 1, 1)
    left, top = SPACING + GAP, SPACING + LABEL
    assert near(sheet.getpixel((left + 32, top + 16)), RED)
    assert near(sheet.getpixel((left + 32, top + 48)), GREEN)
    for row, colour in enumerate((RED, RED, GREEN, GREEN)):
        for column in range(2):
            corner = (left + 64 + GAP + column * (128 + GAP), top + row * (128 + GAP))
            assert near(sheet.getpixel((corner[0] + 64, corner[1] + 64)), colour)


def test_pages_that_are_not_split_stand_alone() -> None:
    sheet = made(False, 2, 2, size=(64, 64))
    assert sheet.height == 64 + LABEL + GAP + 2 * SPACING
    for start in (SPACING, sheet.width // 2 + SPACING // 2):
        assert near(sheet.getpixel((start + GAP + 32, SPACING + LABEL + 16)), RED)
        assert near(sheet.getpixel((start + GAP + 32, SPACING + LABEL + 48)), GREEN)


@pytest.mark.parametrize("values", [{"columns": 0, "page_side": 99}, {"columns": 1, "page_side": 8}])
def test_bad_layouts(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        GalleryConfig(**values)
