"""What a run's model said or made of held-out samples, evaluation by evaluation: `samples/`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cantata.tools.html import data_url
from cantata.tools.report.experts import spread

EVALUATIONS, SHEETS = 5, 4
"""Of a sample's texts and of pictures; first and last are shown."""
SAMPLES = 12
LETTERS = 300
"""Of a text; the rest of a longer one is counted."""
THUMBNAIL, SHEET = 160, 1600
"""Pixels of the longest side."""
STEP = re.compile(r"step-(\d+)")


class Said(NamedTuple):
    """What the model said at an evaluation."""

    step: int
    text: str
    is_right: bool | None
    """None where nobody judged it."""


class Shown(NamedTuple):
    """A held-out sample."""

    key: str
    truth: str
    images: list[str]
    """Data URLs."""
    said: list[Said]


class Sheet(NamedTuple):
    """A picture that an evaluation left."""

    name: str
    step: int | None
    url: str
    width: int
    height: int


class Samples(NamedTuple):
    """What the page shows, and how much there is."""

    shown: list[Shown]
    samples: int
    evaluations: int
    sheets: list[Sheet]
    pictures: int
    problems: list[str]
    """Files that cannot be read, a line each."""


def read_samples(folder: Path) -> Samples:
    """Everything in `samples/`; nothing where a run keeps none."""
    problems: list[str] = []
    files = sorted(folder.glob("step-*.jsonl"))
    by_key: dict[str, Shown] = {}
    for place in spread(len(files), EVALUATIONS):
        for record in _records(files[place], problems):
            key, text = str(record.get("sample", "")), record.get("caption", record.get("answer"))
            if not isinstance(text, str):
                continue
            if key not in by_key:
                by_key[key] = Shown(key, cut(str(record.get("truth", ""))), [], [])
            right = record.get("right")
            said = Said(_step(files[place]) or 0, cut(text), right if isinstance(right, bool) else None)
            by_key[key].said.append(said)
            if not by_key[key].images and len(by_key) <= SAMPLES:
                by_key[key].images.extend(_images(folder, record.get("images"), problems))
    pictures = sorted(folder.glob("*.png"))
    sheets = [_sheet(pictures[place], problems) for place in spread(len(pictures), SHEETS)]
    shown = list(by_key.values())[:SAMPLES]
    found = [sheet for sheet in sheets if sheet is not None]
    return Samples(shown, len(by_key), len(files), found, len(pictures), problems)


def cut(text: str) -> str:
    """A text of at most `LETTERS`, and how many are left out."""
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} ... {len(text) - LETTERS:,} more letters"


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    found, broken = [], 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            broken += 1
    if broken:
        problems.append(f"{path}: {broken} broken line{'s' if broken > 1 else ''} left out")
    return found


def _images(folder: Path, names: Any, problems: list[str]) -> list[str]:
    """Pictures beside a sample; names that lead out of the folder are none of ours."""
    urls = []
    for name in names if isinstance(names, list) else []:
        path = folder / str(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name} lies outside {folder}; left out")
            continue
        image = _open(path, THUMBNAIL, problems)
        if image is not None:
            urls.append(data_url(image))
    return urls


def _sheet(path: Path, problems: list[str]) -> Sheet | None:
    image = _open(path, SHEET, problems)
    return None if image is None else Sheet(path.name, _step(path), data_url(image), *image.size)


def _open(path: Path, side: int, problems: list[str]) -> Image.Image | None:
    try:
        with Image.open(path, formats=["PNG"]) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    image.thumbnail((side, side))
    return image


def _step(path: Path) -> int | None:
    match = STEP.match(path.stem)
    return int(match[1]) if match else None
