"""The images, clips and PDFs of a record, and the places in its text where they belong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cantata.core.samples import DataError, Part
from cantata.data.formats.base import Media, Record

PLACEHOLDERS = {"<image>": "image", "<video>": "video", "<pdf>": "pdf"}
KINDS = tuple(PLACEHOLDERS.values())

_PLACE = re.compile("|".join(PLACEHOLDERS))


class Ref(NamedTuple):
    """A media file that is not loaded yet."""

    kind: str
    """image, video or pdf."""
    value: Any
    """A path, the file's bytes, or what else `Media` takes."""
    options: Mapping[str, Any]
    """What the record says of how to read it, such as `num_frames`."""


Piece = str | Ref | None
"""Text, a media file, or the place of one that the record does not have."""


@dataclass
class Attached:
    """The media of one record, handed out in order.

    Args:
        record: its keys `image`/`images`, `video`/`videos`, `pdf`/`pdfs` hold one reference or a list.
        typed: kinds whose places are typed parts, so that their placeholders in text are mere text.
    """

    record: Record
    typed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("audio", "audios"):
            if self.record.get(name):
                raise DataError("unsupported content", "audio")
        self._refs = {kind: attached_refs(self.record, kind) for kind in KINDS}
        self._taken = dict.fromkeys(KINDS, 0)

    def take(self, kind: str) -> Ref | None:
        """The next file of the kind; None where there is no more, which `check` reports."""
        place = self._taken[kind]
        self._taken[kind] += 1
        return self._refs[kind][place] if place < len(self._refs[kind]) else None

    def all(self) -> list[Ref]:
        """Every file, taken."""
        self._taken = {kind: len(refs) for kind, refs in self._refs.items()}
        return [ref for refs in self._refs.values() for ref in refs]

    def split(self, text: str, literal_without_media: bool) -> list[Piece]:
        """Text and files in order, cut at the placeholders.

        With `literal_without_media`, a placeholder of a kind that the record has no file of is text.
        """
        pieces: list[Piece] = []
        start = 0
        for match in _PLACE.finditer(text):
            kind = PLACEHOLDERS[match.group()]
            if kind in self.typed or (literal_without_media and not self._refs[kind]):
                continue
            pieces += [text[start : match.start()], self.take(kind)]
            start = match.end()
        return [*pieces, text[start:]]

    def check(self) -> None:
        """Raises `DataError("wrong number of images")` (or videos, pdfs) unless each was taken once."""
        for kind, refs in self._refs.items():
            if len(refs) != self._taken[kind]:
                raise DataError(
                    f"wrong number of {kind}s", f"{self._taken[kind]} places for {len(refs)} {kind}s"
                )


def load(pieces: Iterable[Piece], media: Media) -> tuple[Part, ...]:
    """The pieces with their files read, neighbouring texts joined and empty ones left out."""
    parts: list[Part] = []
    for piece in pieces:
        if isinstance(piece, str):
            if piece and parts and isinstance(parts[-1], str):
                parts[-1] += piece
            elif piece:
                parts.append(piece)
        elif piece is not None and piece.kind == "image":
            parts.append(media.image(piece.value))
        elif piece is not None and piece.kind == "video":
            parts.append(media.video(piece.value, **piece.options))
        elif piece is not None:
            parts += media.pdf(piece.value, **piece.options)
    return tuple(parts)


def attached_refs(record: Record, kind: str) -> list[Ref]:
    """The record's files of one kind. Raises `DataError`."""
    one, many = record.get(kind), record.get(f"{kind}s")
    if one is not None and many:
        raise DataError(f"bad {kind} reference", f"both `{kind}` and `{kind}s` are there")
    named = one if one is not None else many
    if named is None or (isinstance(named, Mapping) and not any(named.values())):
        # A table's column of structs is filled up with structs of nothing.
        return []
    listed = isinstance(named, Sequence) and not isinstance(named, (str, bytes))
    return [ref_of(item, kind) for item in (named if listed else [named])]


def ref_of(item: Any, kind: str) -> Ref:
    """A reference as a record writes it: whatever `Media` takes, or a mapping with `path`, `url` or `bytes`.

    Further keys of the mapping are options; `num_frames` counts only where it is above 0, as Aria's authors
    have it. Raises `DataError`.
    """
    options: dict[str, Any] = {}
    if isinstance(item, Mapping):
        options = {str(name): value for name, value in item.items() if value is not None}
        frames = options.get("num_frames")
        if isinstance(frames, (int, float)) and frames <= 0:
            del options["num_frames"]
        named = [options.pop(name, None) for name in ("bytes", "path", "url")]
        item = next((value for value in named if value is not None), None)
    if item is None or item in ("", b""):
        raise DataError(f"missing {kind}", "an empty reference")
    return Ref(kind, item, options)
