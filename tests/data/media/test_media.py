import base64
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cantata.core.samples import DataError, Video
from cantata.data.media import Media
from cantata.data.media.video import read_video
from tests.data.helpers import encoded
from tests.data.media.clips import PDF, VIDEO, encoded_clip, picture
from tests.data.media.test_pdf import FOUR, colours

RED = Image.new("RGB", (6, 4), (255, 0, 0))
PNG = encoded(RED)
CLIP = encoded_clip(12)


@pytest.fixture
def media(tmp_path: Path) -> Media:
    (tmp_path / "set/deep").mkdir(parents=True)
    (tmp_path / "set/deep/red.png").write_bytes(PNG)
    (tmp_path / "set/clip.mp4").write_bytes(CLIP)
    (tmp_path / "set/four.pdf").write_bytes(FOUR)
    (tmp_path / "out.png").write_bytes(PNG)
    return Media(tmp_path / "set", VIDEO, PDF)


def references(name: str, data: bytes, kind: str) -> list[Any]:
    return [
        name,
        Path(name),
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"bytes": data, "path": "../elsewhere"},
        {"bytes": None, "path": name},
        {"path": name},
        f"data:{kind};base64,{base64.b64encode(data).decode()}",
    ]


def test_every_way_to_name_an_image(media: Media) -> None:
    for reference in [*references("deep/red.png", PNG, "image/png"), RED]:
        assert media.image(reference) == RED


def test_pictures_become_rgb(media: Media) -> None:
    assert media.image(Image.new("L", (6, 4), 7)).mode == "RGB"


def test_every_way_to_name_a_clip(media: Media) -> None:
    wanted = read_video(CLIP, dataclasses.replace(VIDEO, num_frames=3))
    for reference in references("clip.mp4", CLIP, "video/mp4"):
        assert media.video(reference, num_frames=3) == wanted


def test_a_list_of_frames_is_a_clip(media: Media) -> None:
    frames = [encoded(picture(number)) for number in range(12)]
    assert media.video(frames) == Video(tuple(picture(number) for number in range(12)))
    assert media.video(frames, num_frames=2) == Video((picture(3), picture(9)))
    assert media.video(["deep/red.png"]) == Video((RED,))
    with pytest.raises(DataError, match="no frames"):
        media.video([])


def test_every_way_to_name_a_document(media: Media) -> None:
    for reference in references("four.pdf", FOUR, "application/pdf"):
        assert colours(media.pdf(reference)) == [0, 1, 2, 3]
        assert colours(media.pdf(reference, pages="4,1")) == [3, 0]
    assert media.pdf([PNG, RED]) == [RED, RED]
    with pytest.raises(DataError, match="too many pages"):
        media.pdf([PNG] * 9)
    with pytest.raises(DataError, match="bad PDF options"):
        media.pdf(FOUR, page=3)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (None, "no file named"),
        ("", "no file named"),
        (7, "no file named"),
        ({}, "no file named"),
        ({"bytes": None, "path": None}, "no file named"),
        ({"url": "x"}, "no file named"),
        ("data:image/png,abc", "bad data address"),
        ("data:image/png;base64,%%%", "bad data address"),
        ("data:", "bad data address"),
        ("data:;base64,\u00e9", "bad data address"),
        ("https://example.org/a", "remote file"),
        ("../out.png", "path outside the root"),
        ("absent", "missing file"),
        ("deep", "not a regular file"),
    ],
)
def test_what_names_no_file(media: Media, reference: Any, reason: str) -> None:
    for opened in (media.image, media.video, media.pdf):
        with pytest.raises(DataError) as caught:
            opened(reference)
        assert caught.value.reason == reason


def test_files_under_another_name(media: Media) -> None:
    (media.root / "text.jpg").write_text("not a picture")
    (media.root / "clip.jpg").write_bytes(CLIP)
    (media.root / "red.gif").write_bytes(PNG)
    assert media.image("red.gif") == RED
    with pytest.raises(DataError, match="corrupt image"):
        media.image("text.jpg")
    with pytest.raises(DataError, match="corrupt image"):
        media.image("clip.jpg")
    with pytest.raises(DataError, match="corrupt PDF"):
        media.pdf("clip.mp4")


def test_it_pickles(media: Media) -> None:
    assert pickle.loads(pickle.dumps(media)).image("deep/red.png") == RED


def test_the_root_may_be_behind_a_link(media: Media, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(media.root)
    assert Media(tmp_path / "link", VIDEO, PDF).image("deep/red.png") == RED
