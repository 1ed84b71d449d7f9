"""What a model said, and beside it small pictures of what it was shown, for people who read both later."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cantata.core.samples import Part, Video

FOLDER = "pictures"
"""Inside `samples/`."""
SIDE = 160
"""Pixels of the longest side."""
MOST = 4
"""Pictures of one sample."""


def keep_records(samples: Path, step: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Write `step-<step>.jsonl`, a line a record."""
    samples.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (samples / f"step-{step:08d}.jsonl").write_text(lines, encoding="utf-8")


def keep_pictures(samples: Path, key: str, parts: Sequence[Part]) -> list[str]:
    """Write the images among `parts`, of clips the first frame, and return their names inside `samples`.

    What is there already stays: held-out samples do not change within a run.
    """
    names = []
    for number, image in enumerate(_images(parts)[:MOST]):
        name = f"{FOLDER}/{re.sub(r'[^A-Za-z0-9_.-]', '-', key)}-{number}.png"
        path = samples / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            small.save(path)
        names.append(name)
    return names


def _images(parts: Sequence[Part]) -> list[Image.Image]:
    found = []
    for part in parts:
        if isinstance(part, Image.Image):
            found.append(part)
        elif isinstance(part, Video):
            found.append(part.frames[0])
    return found
