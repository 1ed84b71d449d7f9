import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2 as pdfium
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.media.pdf import chosen_pages, page_sizes, read_pdf
from tests.data.media.clips import PDF

DOCUMENTS = Path(__file__).parents[4] / "shared/data/documents"
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)]


def document(sizes: list[tuple[float, float]], turn: int = 0) -> bytes:
    """A PDF whose pages are filled with `COLOURS`; without any, an empty one."""
    made = pdfium.PdfDocument.new()
    for (width, height), colour in zip(sizes, COLOURS, strict=False):
        page = made.new_page(width, height)
        image = pdfium.PdfImage.new(made)
        image.set_bitmap(pdfium.PdfBitmap.from_pil(Image.new("RGB", (8, 8), colour)))
        image.set_matrix(pdfium.PdfMatrix().scale(width, height / 2))
        page.insert_obj(image)
        page.gen_content()
        page.set_rotation(turn)
    buffer = io.BytesIO()
    made.save(buffer)
    return buffer.getvalue()


FOUR = document([(40, 60)] * 4)


def colours(images: list[Image.Image]) -> list[int]:
    """Which colour fills the lower half of each page."""
    found = [np.asarray(image)[-2, 2].astype(int) for image in images]
    return [min(range(4), key=lambda i: abs(np.array(COLOURS[i]) - pixel).sum()) for pixel in found]


@pytest.mark.parametrize(
    ("pages", "wanted"),
    [
        (None, [0, 1, 2, 3]),
        ("all", [0, 1, 2, 3]),
        ("2", [1]),
        ("3,1", [2, 0]),
        ("1-2, 4", [0, 1, 3]),
        ("3-", [2, 3]),
        (3, [2]),
        ([4, 2], [3, 1]),
        (range(1, 3), [0, 1]),
    ],
)
def test_pages_in_the_order_asked_for(pages: Any, wanted: list[int]) -> None:
    images = read_pdf(FOUR, PDF, pages)
    assert colours(images) == wanted
    assert {(image.mode, image.size) for image in images} == {("RGB", (40, 60))}


def test_the_page_is_white_scaled_and_turned() -> None:
    [page] = read_pdf(document([(40, 60)]), dataclasses.replace(PDF, scale=2.0))
    assert (page.size, page.getpixel((5, 5))) == ((80, 120), (255, 255, 255))
    [turned] = read_pdf(document([(40, 60)], turn=90), PDF)
    assert turned.size == (60, 40)


@pytest.mark.parametrize(
    "pages", ["", "x", "1-2-3", "-", "0x1", "3-2", "1,,2", [], [True], ["1"], "1e9", 1.5]
)
def test_bad_ranges(pages: Any) -> None:
    with pytest.raises(DataError, match="bad page range"):
        chosen_pages(pages, 9, 9)


@pytest.mark.parametrize("pages", ["0", "10", "2-10", "999999999", [-1], [10], 0, 10**30])
def test_pages_that_are_not_there(pages: Any) -> None:
    with pytest.raises(DataError, match="no such page"):
        chosen_pages(pages, 9, 9)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 2.7])
def test_sizes_before_rendering_are_those_after_it(scale: float) -> None:
    data = document([(40, 60), (33.3, 47.9), (612, 792)], turn=90)
    options = dataclasses.replace(PDF, scale=scale, pages="3,1-2", max_pixels=10**7)
    sizes = page_sizes(data, options)
    assert [size.number for size in sizes] == [3, 1, 2]
    assert [(size.width, size.height) for size in sizes] == [page.size for page in read_pdf(data, options)]
    with pytest.raises(DataError, match="page too large"):
        page_sizes(data, dataclasses.replace(options, max_pixels=100))


def test_too_many_pages() -> None:
    for pages in ("all", "1-3", "1,1,1", [1, 2, 3]):
        with pytest.raises(DataError, match="too many pages"):
            chosen_pages(pages, 4, 2)


def test_a_page_larger_than_allowed() -> None:
    with pytest.raises(DataError, match="page too large"):
        read_pdf(document([(40, 14000)]), dataclasses.replace(PDF, max_pixels=40 * 14000 - 1))


def million_pages() -> bytes:
    return re.sub(rb"/Count 4", b"/Count 1000000", FOUR)


NO_PAGES = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj
trailer<</Root 1 0 R>>
"""
ENCRYPTED = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj
4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>endobj
trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>
""" % (b"ab" * 32, b"cd" * 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty PDF"),
        (b"no document", "corrupt PDF"),
        (document([]), "corrupt PDF"),
        (NO_PAGES, "corrupt PDF"),
        (FOUR[:20], "corrupt PDF"),
        (ENCRYPTED, "encrypted PDF"),
        (million_pages(), "too many pages|corrupt PDF|empty PDF"),
    ],
    ids=["no bytes", "text", "no pages", "no pages, well-formed", "header", "encrypted", "a million pages"],
)
def test_bad_documents(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^({reason})"):
        read_pdf(data, PDF)


def test_a_million_pages_are_not_looked_for() -> None:
    assert b"1000000" in million_pages()
    with pytest.raises(DataError):
        read_pdf(million_pages(), PDF, "1-900000")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing PDF"):
        read_pdf(tmp_path / "absent.pdf", PDF)


@pytest.mark.parametrize("change", [{"pages": "two"}, {"pages": ""}, {"scale": 0.0}, {"max_pages": 0}])
def test_bad_options(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(PDF, **change)


def test_the_users_slides() -> None:
    if not DOCUMENTS.is_dir():
        pytest.skip(f"{DOCUMENTS} is absent")
    options = dataclasses.replace(PDF, max_pages=23, scale=0.5)
    for name, count in (("icml-slides.pdf", 9), ("zero-infinity-slides.pdf", 23)):
        pages = read_pdf(DOCUMENTS / name, options)
        assert [page.size for page in pages] == [(480, 270)] * count
        assert pages[0] == read_pdf((DOCUMENTS / name).read_bytes(), options, 1)[0]
        # Slides are neither blank nor all alike.
        assert len({page.tobytes() for page in pages}) > count // 2
