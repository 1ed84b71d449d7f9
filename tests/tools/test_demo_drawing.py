from pathlib import Path

from PIL import Image

from cantata.data.sources import CaptionedImages
from cantata.data.split import Split
from cantata.tools.demo_drawing import EACH, GAP, drawn_names, picture_of


def names_of(split: Split) -> set[str]:
    data = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", split, 0.05)
    return {data[index].parts[1] for index in range(len(data))}


def test_half_of_the_names_were_never_trained_on() -> None:
    names = drawn_names()
    assert len(set(names)) == len(names) == 2 * EACH
    assert set(names[:EACH]) <= names_of(Split.train)
    assert set(names[EACH:]) <= names_of(Split.held_out)


def test_the_sheet_has_the_real_ones_above_the_drawn_ones(tmp_path: Path) -> None:
    names = drawn_names()
    for number in range(1, len(names) + 1):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"emoji-{number}.png")
    sheet = picture_of(tmp_path / "emoji.png", names)
    assert sheet.size == (len(names) * (64 + GAP) - GAP, 2 * 64 + GAP)
    assert [sheet.getpixel((n * (64 + GAP), 64 + GAP))[0] for n in range(len(names))] == [*range(1, 13)]
