"""The nearest valid name, so that a message says what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None where nothing is near."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return found[0] if found else None


def hint(name: str, options: Iterable[str]) -> str:
    """How an "unknown" message goes on: the nearest option, or else all of them."""
    known = sorted(options)
    found = nearest(name, known)
    if found is not None:
        return f"; nearest: {found}"
    return f"; known: {', '.join(known)}" if known else ""
