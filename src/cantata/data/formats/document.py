"""Text, images with what is said of them, and images alone."""

from __future__ import annotations

from cantata.core.samples import DataError, Document, Part
from cantata.data.formats.attached import Attached, load
from cantata.data.formats.base import Media, Record, keys_of, text_of

TEXTS = ("txt", "text", "caption")
"""Keys of a document's text; the first that is there counts."""


def text(record: Record, media: Media) -> Document:
    """The record's media, then its text; or the media at their placeholders, where the text has such."""
    name = next((name for name in TEXTS if record.get(name) is not None), None)
    if name is None:
        raise DataError("unknown format", f"none of {', '.join(TEXTS)} among {keys_of(record)}")
    attached = Attached(record)
    pieces = attached.split(text_of(record[name], name), literal_without_media=True)
    if len(pieces) == 1:
        pieces = [*attached.all(), *pieces]
    attached.check()
    return _document(load(pieces, media))


def image(record: Record, media: Media) -> Document:
    """The record's media alone, without what is said of them."""
    return _document(load(Attached(record).all(), media))


def _document(parts: tuple[Part, ...]) -> Document:
    if not parts:
        raise DataError("empty document")
    return Document(parts)
