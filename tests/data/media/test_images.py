from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cantata.core.samples import DataError
from cantata.data.media.images import open_image
from tests.data.helpers import encoded

RED = Image.new("RGB", (6, 4), (255, 0, 0))


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (RED, (255, 0, 0)),
        (Image.new("RGBA", (6, 4), (0, 0, 255, 0)), (255, 255, 255)),
        (Image.new("RGBA", (6, 4), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (6, 4), (0, 0)), (255, 255, 255)),
        (Image.new("L", (6, 4), 7), (7, 7, 7)),
        (RED.convert("P"), (255, 0, 0)),
        (Image.new("1", (6, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 6), 128 * 256, dtype=np.uint16)), (128, 128, 128)),
    ],
    ids=["RGB", "RGBA clear", "RGBA half", "LA", "L", "P", "1", "16 bit"],
)
def test_every_mode_becomes_rgb(image: Image.Image, pixel: tuple[int, int, int]) -> None:
    opened = open_image(encoded(image))
    assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (6, 4), pixel)


def test_palette_with_a_transparent_colour() -> None:
    opened = open_image(encoded(RED.convert("P"), transparency=RED.convert("P").getpixel((0, 0))))
    assert opened.getpixel((0, 0)) == (255, 255, 255)


def test_turned_as_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(RED, "JPEG", exif=exif)).size == (4, 6)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_is_corrupt(format: str) -> None:
    whole = encoded(noise(), format)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(DataError) as caught:
            open_image(whole[: int(len(whole) * share)])
        assert caught.value.reason == "corrupt image"


def test_flipped_bytes_never_raise_anything_else() -> None:
    whole = encoded(noise())
    for place in range(8, len(whole), 97):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        try:
            open_image(bytes(broken))
        except DataError:
            continue


def test_no_image_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="corrupt image"):
        open_image(b"not an image")
    with pytest.raises(DataError, match="missing image"):
        open_image(tmp_path / "absent.png")


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(noise())
    for limit in (3000, 1000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="image too large"):
            open_image(whole)


def test_cmyk() -> None:
    opened = open_image(encoded(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "TIFF"))
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGB", (255, 0, 0))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    blue = Image.new("RGB", (6, 4), (0, 0, 255))
    opened = open_image(encoded(RED, format, save_all=True, append_images=[blue, blue], **options))
    assert (opened.size, opened.getpixel((1, 1))) == ((6, 4), (255, 0, 0))


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for source in (b"", tmp_path / "empty.png"):
        with pytest.raises(DataError, match="empty image"):
            open_image(source)


def test_programs_are_not_run() -> None:
    # Pillow would hand this to ghostscript.
    with pytest.raises(DataError, match="corrupt image"):
        open_image(encoded(RED, "EPS"))


def test_odd_metadata_is_no_concern() -> None:
    whole = encoded(RED, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert open_image(whole).size == RED.size
