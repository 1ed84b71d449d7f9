"""Which format records are in: by their keys, or by name."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from cantata.core.errors import ConfigError
from cantata.data.formats.attached import KINDS
from cantata.data.formats.base import FormatFunction, Record, keys_of
from cantata.data.formats.chat import alpaca, messages, sharegpt
from cantata.data.formats.document import TEXTS, image, text


class Format(Enum):
    """How records are written; `auto` finds out by their keys."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    llava = "llava"
    alpaca = "alpaca"
    text = "text"
    caption = "caption"
    image = "image"


FORMATS: dict[Format, FormatFunction] = {
    Format.messages: messages,
    Format.sharegpt: sharegpt,
    Format.llava: sharegpt,
    Format.alpaca: alpaca,
    Format.text: text,
    Format.caption: text,
    Format.image: image,
}

KEYS = {
    Format.messages: "messages",
    Format.sharegpt: "conversations",
    Format.llava: "conversations",
    Format.alpaca: "instruction, output",
    Format.text: "text",
    Format.caption: "image, text or caption",
    Format.image: "image alone",
}
"""What each format is known by, for messages."""


def choose_format(records: Sequence[Record], wanted: Format) -> FormatFunction:
    """The format of a dataset by its first records.

    Raises `ConfigError` where they fit none, or several, or not the one that is wanted.
    """
    fits = [fitting(record) for record in records]
    found = {FORMATS[one] for formats in fits for one in formats}
    if wanted is not Format.auto:
        if wanted is not Format.image and FORMATS[wanted] not in found:
            raise ConfigError(
                f"format={wanted.value} reads {KEYS[wanted]}; the records hold {keys_of(records[0])}"
            )
        return FORMATS[wanted]
    if len(found) == 1:
        return found.pop()
    if found:
        named = sorted({one.value for formats in fits for one in formats})
        raise ConfigError(
            f"the records fit several formats ({', '.join(named)}); name one with format=; "
            f"the first holds {keys_of(records[0])}"
        )
    known = "; ".join(f"{one.value} ({keys})" for one, keys in KEYS.items())
    raise ConfigError(
        f"the records hold {keys_of(records[0])}, which is no format known: {known}; name one with format=, "
        "or write a template"
    )


def fitting(record: Record) -> list[Format]:
    """The formats that this record's keys speak of."""
    present = {name for name, value in record.items() if value is not None}
    media = {name for kind in KINDS for name in (kind, f"{kind}s")} & present
    found = []
    if "messages" in present:
        found.append(Format.messages)
    if "conversations" in present:
        found.append(Format.llava if media & set(KINDS) else Format.sharegpt)
    if {"instruction", "output"} <= present:
        found.append(Format.alpaca)
    if present & set(TEXTS):
        found.append(Format.caption if media else Format.text)
    if media and not present - media - {"id", "__key__"}:
        # Never by itself where other columns would go unread: they may be what is to be learned.
        found.append(Format.image)
    return found
