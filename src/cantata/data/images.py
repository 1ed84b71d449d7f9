"""Opening images that others made: upright, RGB, and never half-read."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from cantata.core.samples import DataError

BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)
"""What Pillow's decoders raise on damaged files."""


def open_image(source: bytes | Path) -> Image.Image:
    """Decode a whole image: turned as its EXIF says, transparency laid on white, RGB.

    Raises `DataError` with the reason "missing image", "image too large" (Pillow's guard against
    decompression bombs) or "corrupt image" (truncated files too).
    """
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except OSError as error:
            raise DataError("missing image", str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("image too large", str(error)) from error
    except BROKEN as error:
        raise DataError("corrupt image", f"{type(error).__name__}: {error}") from error


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
