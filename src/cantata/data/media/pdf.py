"""Pages of PDF documents as images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import pypdfium2 as pdfium
from PIL import Image
from pypdfium2 import raw

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError

ALL = "all"
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{1,9})?\s*)?")

BROKEN = (pdfium.PdfiumError, OSError, ValueError, LookupError, ArithmeticError, AssertionError, TypeError)
"""What pypdfium2 raises on damaged files."""


@dataclass(frozen=True)
class PdfOptions:
    """How documents become page images."""

    pages: str
    """`all`, or numbers and ranges from 1 in the order wanted: `1-3,7`, `5-` to the last page."""
    scale: float
    """Pixels for each point (1/72 inch); 2 makes a Letter page 1224 x 1584."""
    max_pages: int
    """Pages of a document at most; a sample that asks for more is refused, never cut."""
    max_pixels: int
    """Pixels of a page at most; larger ones are refused."""

    def __post_init__(self) -> None:
        for name in ("max_pages", "max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pdf.{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.scale < 100:
            raise ConfigError(f"pdf.scale={self.scale} must be above 0 and below 100")
        if self.pages != ALL and not _parsed(self.pages):
            raise ConfigError(f"pdf.pages={self.pages!r} is neither `all` nor numbers and ranges as in 1-3,7")


class PageSize(NamedTuple):
    """A page before it is rendered."""

    number: int
    """From 1, in its document."""
    width: int
    """Pixels."""
    height: int


def page_sizes(source: bytes | Path, options: PdfOptions) -> list[PageSize]:
    """The pages that `read_pdf` would return, without rendering them. Raises `DataError` as it does."""
    with _opened(source) as document:
        sizes = []
        for number in chosen_pages(options.pages, len(document), options.max_pages):
            with _page(document, number) as page:
                sizes.append(_size(page, number, options))
        return sizes


def read_pdf(
    source: bytes | Path, options: PdfOptions, pages: str | Sequence[int] | int | None = None
) -> list[Image.Image]:
    """The chosen pages as RGB images on white, in the order asked for; `pages` replaces those of the options.

    Raises `DataError`: "missing PDF", "empty PDF", "encrypted PDF", "corrupt PDF" (without pages too),
    "too many pages", "no such page", "bad page range", "page too large".
    """
    with _opened(source) as document:
        asked = options.pages if pages is None else pages
        wanted = chosen_pages(asked, len(document), options.max_pages)
        return [_render(document, number, options) for number in wanted]


@contextmanager
def _opened(source: bytes | Path) -> Iterator[pdfium.PdfDocument]:
    if isinstance(source, Path) and not source.is_file():
        raise DataError("missing PDF", str(source))
    if not (source if isinstance(source, bytes) else source.stat().st_size):
        raise DataError("empty PDF", "0 bytes")
    document = _open(source)
    try:
        yield document
    finally:
        document.close()


def _open(source: bytes | Path) -> pdfium.PdfDocument:
    try:
        return pdfium.PdfDocument(source)
    except pdfium.PdfiumError as error:
        if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
            raise DataError("encrypted PDF", "it asks for a password; save it without one") from error
        raise DataError("corrupt PDF", str(error)) from error
    except BROKEN as error:
        raise DataError("corrupt PDF", f"{type(error).__name__}: {error}") from error


@contextmanager
def _page(document: pdfium.PdfDocument, number: int) -> Iterator[pdfium.PdfPage]:
    try:
        page = document[number]
        try:
            yield page
        finally:
            page.close()
    except BROKEN as error:
        raise DataError("corrupt PDF", f"page {number + 1}: {type(error).__name__}: {error}") from error


def _size(page: pdfium.PdfPage, number: int, options: PdfOptions) -> PageSize:
    width, height = page.get_size()
    pixels = width * height * options.scale**2
    if not pixels <= options.max_pixels:
        raise DataError(
            "page too large",
            f"page {number + 1} would have {pixels:.0f} pixels at scale {options.scale}, the limit "
            f"is {options.max_pixels}",
        )
    return PageSize(number + 1, ceil(width * options.scale), ceil(height * options.scale))


def _render(document: pdfium.PdfDocument, number: int, options: PdfOptions) -> Image.Image:
    with _page(document, number) as page:
        _size(page, number, options)
        rendered: Image.Image = page.render(scale=options.scale, rev_byteorder=True).to_pil()
        # The bitmap's memory ends with it: the image must own its pixels.
        return rendered.convert("RGB") if rendered.mode != "RGB" else rendered.copy()


def chosen_pages(pages: str | Sequence[int] | int, count: int, max_pages: int) -> list[int]:
    """Indices from 0 of the wanted pages of a document of `count` pages.

    `pages` is what `PdfOptions.pages` holds, or a number or numbers from 1. Raises `DataError`.
    """
    if isinstance(pages, str):
        spans = [(1, count)] if pages.strip() == ALL else _parsed(pages)
        spans = [(first, count if last is None else last) for first, last in spans]
    else:
        listed = [pages] if isinstance(pages, int) else pages
        if not isinstance(listed, Sequence) or not all(type(page) is int for page in listed):
            raise DataError("bad page range", repr(pages)[:200])
        spans = [(page, page) for page in listed]
    if not spans or any(last < first for first, last in spans):
        raise DataError("bad page range", f"{pages!r:.200} of {count} pages")
    for first, last in spans:
        if not 1 <= first <= last <= count:
            raise DataError("no such page", f"{first if first > count or first < 1 else last} of {count}")
    asked = sum(last - first + 1 for first, last in spans)
    if asked > max_pages:
        raise DataError(
            "too many pages", f"{asked} of at most {max_pages}; name the pages, or raise pdf.max_pages"
        )
    return [page - 1 for first, last in spans for page in range(first, last + 1)]


def _parsed(pages: str) -> list[tuple[int, int | None]]:
    """First and last page of each range (None: the document's last); empty where the text says none."""
    found = [_RANGE.fullmatch(part) for part in pages.split(",")]
    spans: list[tuple[int, int | None]] = []
    for match in found:
        if match is None:
            return []
        first, dash, last = match.groups()
        spans.append((int(first), int(last) if last else None if dash else int(first)))
    return spans
