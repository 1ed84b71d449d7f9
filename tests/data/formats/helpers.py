"""Media that only say what was asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from cantata.core.samples import Chat, DataError, Document, Example, Message, Video

RED = Image.new("RGB", (1, 1), (255, 0, 0))


class Loaded(Image.Image):
    """A picture that knows what it was loaded from."""

    def __init__(self, kind: str, reference: Any, overrides: Mapping[str, Any]) -> None:
        super().__init__()
        self.loaded = (kind, reference, dict(overrides)) if overrides else (kind, reference)


class FakeMedia:
    """Takes any reference but `gone`."""

    def image(self, reference: Any) -> Image.Image:
        if reference == "gone":
            raise DataError("missing file", "gone")
        return Loaded("image", reference, {})

    def video(self, reference: Any, **overrides: Any) -> Video:
        return Video((Loaded("video", reference, overrides),))

    def pdf(self, reference: Any, **overrides: Any) -> list[Image.Image]:
        return [Loaded("pdf", reference, {**overrides, "page": page}) for page in (1, 2)]


MEDIA = FakeMedia()


def shown(parts: tuple[Any, ...]) -> list[Any]:
    """Parts with media as what they were loaded from."""
    pictures = [part.frames[0] if isinstance(part, Video) else part for part in parts]
    return [part if isinstance(part, str) else part.loaded for part in pictures]


def turns(example: Example) -> list[tuple[Any, ...]]:
    """(role, parts...) of each message, with its weight where it has one."""
    assert isinstance(example, Chat)

    def one(message: Message) -> tuple[Any, ...]:
        weight = () if message.weight is None else (message.weight,)
        return (message.role, *shown(message.parts), *weight)

    return [one(message) for message in example.messages]


def parts(example: Example) -> list[Any]:
    assert isinstance(example, Document)
    return shown(example.parts)
