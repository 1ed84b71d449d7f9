"""What an inspection found as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cantata.tools import html
from cantata.tools.inspect_data import Inspection, Picture, Token

BINS = 32
"""Bars of a histogram of lengths."""
SHOWN_TOKENS = 4096
"""Tokens and images of a sample that the page holds; the rest of a longer one is counted."""


def page(found: Inspection, figures: Mapping[str, Any]) -> str:
    """The page; every text of the data is escaped."""
    environment = html.environment()
    environment.filters["data_url"] = html.data_url
    environment.filters["visible"] = visible
    environment.tests["picture"] = lambda item: isinstance(item, Picture)
    template = environment.get_template("inspect.html.jinja")
    return template.render(found=found, figures=figures, limit=SHOWN_TOKENS)


def visible(token: Token) -> str:
    """A token's text as `html.visible` shows it."""
    return html.visible(token.text)
