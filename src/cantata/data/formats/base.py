"""What every format shares: loading media, and refusing what is no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from cantata.core.samples import DataError, Example, Video
from cantata.data.records.base import IMAGES, VIDEOS

Record = Mapping[str, Any]
"""A raw record; a key with the value None is absent, as tables fill their columns up."""


class Media(Protocol):
    """Loads what records refer to, as `cantata.data.media.Media` does; everything raises `DataError`."""

    def image(self, reference: Any) -> Image.Image: ...

    def video(self, reference: Any, **overrides: Any) -> Video: ...

    def pdf(self, reference: Any, **overrides: Any) -> Sequence[Image.Image]: ...


FormatFunction = Callable[[Record, Media], Example]
"""A format: raises `DataError` for a record that it cannot turn into an example."""


def text_of(value: Any, where: str) -> str:
    """`value`, where it is text. Raises `DataError("bad text")` for None, NaN and broken Unicode too."""
    if not isinstance(value, str):
        raise DataError("bad text", f"{where} is {'null' if value is None else repr(value)[:60]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError("bad text", f"{where}: half a surrogate pair at {error.start}") from error
    return value


def required(record: Record, name: str) -> Any:
    """The value of a key. Raises `DataError("unknown format")` where it is absent."""
    value = record.get(name)
    if value is None:
        raise DataError("unknown format", f"no {name!r} among {keys_of(record)}")
    return value


def keys_of(record: Record) -> str:
    """The keys that hold something, for messages."""
    names = [str(name) for name, value in record.items() if value is not None]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no keys"


def merged(record: Record) -> dict[str, Any]:
    """The record with a webdataset's members under the usual names.

    The keys of its `json` join the others, and members named after a media type become `images`, `videos`
    and `pdfs`, unless the record has such keys.
    """
    whole = dict(record)
    if isinstance(inner := whole.get("json"), Mapping):
        whole = {**inner, **{name: value for name, value in whole.items() if name != "json"}}
    for name, plural, endings in (
        ("image", "images", IMAGES),
        ("video", "videos", VIDEOS),
        ("pdf", "pdfs", frozenset({"pdf"})),
    ):
        if whole.get(name) is None and whole.get(plural) is None:
            members = [key for key in whole if _is_member(whole, key, endings)]
            if members:
                whole[plural] = [whole.pop(key) for key in members]
    return whole


def _is_member(record: Record, key: str, endings: frozenset[str]) -> bool:
    return key.rpartition(".")[2] in endings and isinstance(record[key], bytes)
