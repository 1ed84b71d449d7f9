"""What an inspection found as one page that needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from cantata.tools.inspect_data import Inspection, Picture, Token

TEMPLATE = Path(__file__).with_name("inspect.html.jinja")
BINS = 32
"""Bars of a histogram of lengths."""
SHOWN_TOKENS = 4096
"""Tokens and images of a sample that the page holds; the rest of a longer one is counted."""


def page(found: Inspection, figures: Mapping[str, Any]) -> str:
    """The page; every text of the data is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_url"] = data_url
    environment.filters["visible"] = visible
    environment.tests["picture"] = lambda item: isinstance(item, Picture)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(found=found, figures=figures, limit=SHOWN_TOKENS)


def data_url(image: Image.Image) -> str:
    """The pixels as they are, inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def visible(token: Token) -> str:
    """A token's text with line ends that can be seen, and nothing that could reorder the page."""
    text = "".join(_shown(letter) for letter in token.text)
    return text or "\u2205"


def _shown(letter: str) -> str:
    if letter == "\n":
        return "\u21b5\n"
    if letter == "\t":
        return "\u21e5\t"
    if letter == " " or (letter.isprintable() and not 0xE000 <= ord(letter) <= 0xF8FF):
        return letter
    return f"\\u{ord(letter):04x}"
