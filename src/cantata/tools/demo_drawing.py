"""What the demo's artist draws, and the sheet that shows it beside the real emoji."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from cantata.data.sources import CaptionedImages
from cantata.data.split import Split

EACH = 6
"""Names of each half: trained on, and held out."""
GAP = 4


def drawn_names() -> list[str]:
    """Names of emoji, spread over those that were trained on and then over those that were held out."""
    return [name for split in (Split.train, Split.held_out) for name in list(_named(split))[:EACH]]


def picture_of(out: Path, names: list[str]) -> Image.Image:
    """Real emoji above the drawn ones, which lie beside `out` as `cantata generate` numbers them."""
    real = _named(Split.train) | _named(Split.held_out)
    drawn = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, len(names) + 1)]
    columns = [(real[name], Image.open(file)) for name, file in zip(names, drawn, strict=True)]
    side = max(image.width for image, _ in columns)
    sheet = Image.new("RGB", (len(columns) * (side + GAP) - GAP, 2 * side + GAP), "white")
    for number, (above, below) in enumerate(columns):
        sheet.paste(above, (number * (side + GAP), 0))
        sheet.paste(below, (number * (side + GAP), side + GAP))
    return sheet


def _named(split: Split) -> dict[str, Any]:
    """`EACH` emoji of a split by name, evenly spread."""
    data = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", split, 0.05)
    chosen = [data[number * len(data) // EACH] for number in range(EACH)]
    return {str(example.parts[1]): example.parts[0] for example in chosen}  # type: ignore[union-attr]
