"""Opening images that others made: upright, RGB, and never half-read."""

from __future__ import annotations

import io
import struct
import warnings
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from cantata.core.samples import DataError
from cantata.data.touched import touch

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
"""What is looked for in a file, whatever its name says. Others stay closed: EPS runs a PostScript program."""

BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
)
"""What Pillow's decoders raise on damaged files."""


def open_image(source: bytes | Path) -> Image.Image:
    """Decode a whole image: turned as its EXIF says, transparency laid on white, RGB.

    Of an animation or a file of several pages it is the first. Raises `DataError` with the reason "missing
    image", "empty image", "image too large" (Pillow's guard against decompression bombs) or "corrupt image"
    (truncated files, and files that are no image).
    """
    if isinstance(source, Path):
        touch(source)
        try:
            source = source.read_bytes()
        except OSError as error:
            raise DataError("missing image", str(error)) from error
    if not source:
        raise DataError("empty image", "0 bytes")
    try:
        with warnings.catch_warnings():
            # Odd metadata is nobody's concern: what counts is whether there is a picture.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source), formats=_formats())
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise DataError("image too large", str(error) or "out of memory") from error
    except BROKEN as error:
        raise DataError("corrupt image", f"{type(error).__name__}: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it on a white page."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit grey: convert() would clip it to white.
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        page = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(page, coloured).convert("RGB")
    return image.convert("RGB")
