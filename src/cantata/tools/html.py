"""What pages that need no network share: their templates' rules, and images and texts inside them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

TEMPLATES = Path(__file__).parent


def environment(*folders: Path) -> Environment:
    """Templates of `folders` and of this one; every text is escaped, and a name that is not there fails."""
    return Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_url(image: Image.Image) -> str:
    """The pixels as they are, inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return png_url(buffer.getvalue())


def png_url(png: bytes) -> str:
    """A PNG file inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def visible(text: str) -> str:
    """A text with line ends that can be seen, and nothing that could reorder the page."""
    return "".join(_shown(letter) for letter in text) or "\u2205"


def _shown(letter: str) -> str:
    if letter == "\n":
        return "\u21b5\n"
    if letter == "\t":
        return "\u21e5\t"
    if letter == " " or (letter.isprintable() and not 0xE000 <= ord(letter) <= 0xF8FF):
        return letter
    return f"\\u{ord(letter):04x}"
