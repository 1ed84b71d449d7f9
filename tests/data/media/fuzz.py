"""Damages files in every way that comes to mind and opens them; run as `python -m tests.data.media.fuzz`.

A process of its own, because the native decoders could crash or hang the one that asks: arguments are the
kind of file, a seed and how many damages; the last line says what became of them.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2 as pdfium
from PIL import Image

from cantata.core.samples import DataError
from cantata.data.media import Media, Sampling
from tests.data.media.clips import PDF, VIDEO, encoded_clip

Generator = np.random.Generator


def truncated(data: bytes, rng: Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def flipped(data: bytes, rng: Generator) -> bytes:
    broken = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
        broken[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(broken)


def spoiled_head(data: bytes, rng: Generator) -> bytes:
    """Headers hold the sizes and counts that make decoders allocate and loop."""
    broken = bytearray(data)
    for place in rng.integers(0, min(len(data), 600), int(rng.integers(1, 5))):
        broken[place] = int(rng.choice([0, 1, 127, 128, 254, 255]))
    return bytes(broken)


def spoiled_tail(data: bytes, rng: Generator) -> bytes:
    """Indices are kept at the end."""
    return spoiled_head(data[::-1], rng)[::-1]


def overwritten(data: bytes, rng: Generator) -> bytes:
    start = int(rng.integers(0, len(data)))
    length = int(rng.integers(1, 200))
    return data[:start] + rng.bytes(length) + data[start + length :]


def without_a_piece(data: bytes, rng: Generator) -> bytes:
    start, end = sorted(int(value) for value in rng.integers(0, len(data), 2))
    return data[:start] + data[end:]


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    # The tests' helper of this name brings torch along, which takes longer to import than this to run.
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


DAMAGES = (truncated, flipped, spoiled_head, spoiled_tail, overwritten, without_a_piece)


def images() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    for format in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "TGA", "PPM", "ICO"):
        yield encoded(picture, format)
    for format in ("JPEG", "WEBP", "PNG"):
        yield encoded(picture, format, exif=exif)
    yield encoded(picture.convert("P"), "TIFF", compression="tiff_lzw")
    yield encoded(picture, "GIF", save_all=True, append_images=[picture] * 2)
    yield encoded(picture.convert("CMYK"), "JPEG")


def videos() -> Iterator[bytes]:
    b_frames = {"x264-params": "bframes=2"}
    yield encoded_clip(12, options=b_frames)
    yield encoded_clip(12, container_options={"moov_size": "4000"})
    yield encoded_clip(12, container="matroska", options=b_frames, sound=True)
    yield encoded_clip(12, container="webm", codec="libvpx-vp9", options={"deadline": "realtime"})
    yield encoded_clip(12, container="avi", codec="mpeg4", options={"bf": "2"})
    yield encoded_clip(12, container="avi", options=b_frames)
    yield encoded_clip(12, container="mpegts", options=b_frames)
    yield encoded_clip(12, container="mpeg", codec="mpeg2video", rate=25)
    yield encoded_clip(12, container="flv", options=b_frames)
    yield encoded_clip(12, container="asf", codec="wmv2")
    yield encoded_clip(12, container="gif", codec="gif")


def documents() -> Iterator[bytes]:
    for compress in (True, False):
        made = pdfium.PdfDocument.new()
        for number in range(3):
            page = made.new_page(60, 80)
            image = pdfium.PdfImage.new(made)
            if compress:
                image.load_jpeg(io.BytesIO(encoded(Image.new("RGB", (8, 8), (number, 9, 9)), "JPEG")))
            else:
                image.set_bitmap(pdfium.PdfBitmap.from_pil(Image.new("RGB", (8, 8), (number, 9, 9))))
            image.set_matrix(pdfium.PdfMatrix().scale(60, 40))
            page.insert_obj(image)
            page.gen_content()
        buffer = io.BytesIO()
        made.save(buffer)
        yield buffer.getvalue()


def openers(kind: str) -> tuple[list[bytes], list[Callable[[bytes], Any]]]:
    media = Media(Path("."), dataclasses.replace(VIDEO, num_frames=4), PDF)
    if kind == "images":
        return list(images()), [media.image]
    if kind == "videos":
        samplings = [sampling.value for sampling in Sampling]
        return list(videos()), [lambda data, s=s: media.video(data, sampling=s) for s in samplings]
    return list(documents()), [media.pdf, lambda data: media.pdf(data, pages="2")]


def damaged_files(files: list[bytes], rng: Generator, count: int) -> Iterator[bytes]:
    """Each file cut off at every so many bytes, then random damages, `count` of either."""
    cuts = count // len(files)
    for data in files:
        yield from (data[: len(data) * cut // cuts] for cut in range(cuts))
    for number in range(count):
        yield DAMAGES[number % len(DAMAGES)](files[int(rng.integers(len(files)))], rng)


def main(kind: str, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    files, opens = openers(kind)
    outcomes: collections.Counter[str] = collections.Counter()
    for damaged in damaged_files(files, rng, count):
        for opened in opens:
            try:
                opened(damaged)
                outcomes["opened"] += 1
            except DataError as error:
                outcomes[error.reason] += 1
    print(dict(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
