"""Where a reference found in data may point: at regular files under the dataset's root."""

from __future__ import annotations

import re
from pathlib import Path

from cantata.core.samples import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def resolve_inside(root: Path, reference: str) -> Path:
    """The file that `reference` names, symbolic links followed; relative paths start at `root`.

    `root` must be resolved already. Raises `DataError` with the reason "remote file" for an address,
    "path outside the root" where the path or a link on it leads out, "missing file" where nothing is there,
    and "not a regular file" for folders, pipes and devices, which could block a reader for ever.
    """
    if _SCHEME.match(reference):
        raise DataError(
            "remote file",
            f"{_short(reference)}: files are not fetched while training; download them into {root} first "
            "and write their paths there",
        )
    try:
        found = (root / reference).resolve()
        inside = found.is_relative_to(root)
        exists, regular = inside and found.exists(), inside and found.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long, a loop of links, a null character, half a surrogate pair.
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise DataError("missing file", f"{_short(reference)}: {why}") from error
    if not inside:
        raise DataError(
            "path outside the root", f"{_short(reference)} leads to {found}, which is not in {root}"
        )
    if not exists:
        raise DataError("missing file", f"{_short(reference)} in {root}")
    if not regular:
        raise DataError("not a regular file", f"{_short(reference)} in {root}")
    return found


def _short(reference: str) -> str:
    text = reference if len(reference) <= 200 else f"{reference[:200]}..."
    return ascii(text)[1:-1] if not text.isprintable() else text
