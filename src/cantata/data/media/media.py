"""From what data says of an image, a video or a document to pictures."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cantata.core.samples import DataError, Video
from cantata.data.media.images import open_image, to_rgb
from cantata.data.media.paths import resolve_inside
from cantata.data.media.pdf import PdfOptions, read_pdf
from cantata.data.media.video import VideoOptions, read_video, spread
from cantata.data.touched import touch

Reference = Any
"""A path inside the root, encoded bytes, a mapping with `bytes` or `path` (as `datasets` stores images), a
`data:` address, a PIL image; of a clip or a document also a list of these, its frames or pages."""


class Media:
    """Opens the media of one dataset, each when it is asked for; holds nothing open and pickles.

    Every method raises `DataError` with a reason that can be counted, and nothing else, whatever the
    reference or the file holds.

    Args:
        root: folder of the dataset; relative paths start here, and none leads out of it.
        video: how clips become frames.
        pdf: how documents become pages.
    """

    def __init__(self, root: Path, video: VideoOptions, pdf: PdfOptions) -> None:
        self.root = root.resolve()
        self.video_options = video
        self.pdf_options = pdf

    def image(self, reference: Reference) -> Image.Image:
        """An RGB image."""
        if isinstance(reference, Image.Image):
            return to_rgb(reference)
        return open_image(self._source(reference))

    def video(self, reference: Reference, **overrides: Any) -> Video:
        """The chosen frames of a clip; `overrides` are the sample's own options (`video.OF_A_SAMPLE`).

        Of a list of frames, `num_frames` are taken (of its own options, else `max_frames`), evenly spread.
        """
        options = self.video_options.of_sample(overrides)
        if isinstance(reference, (list, tuple)):
            if not reference:
                raise DataError("no frames", "an empty list")
            asked = overrides.get("num_frames")
            wanted = spread(reference, options.max_frames if asked is None else options.num_frames)
            return Video(tuple(self.image(frame) for frame in wanted))
        return read_video(self._source(reference), options)

    def pdf(self, reference: Reference, **overrides: Any) -> list[Image.Image]:
        """Pages of a document; `overrides` may hold `pages` (`"1-3,7"`, a number, numbers from 1)."""
        unknown = set(overrides) - {"pages"}
        if unknown:
            raise DataError("bad PDF options", f"{', '.join(sorted(unknown))}; known is pages")
        if isinstance(reference, (list, tuple)):
            if not reference or len(reference) > self.pdf_options.max_pages:
                reason = "too many pages" if reference else "empty PDF"
                raise DataError(reason, f"{len(reference)} of at most {self.pdf_options.max_pages}")
            return [self.image(page) for page in reference]
        return read_pdf(self._source(reference), self.pdf_options, overrides.get("pages"))

    def _source(self, reference: Reference) -> bytes | Path:
        """The file's bytes, or where they lie."""
        if isinstance(reference, Mapping):
            held, path = reference.get("bytes"), reference.get("path")
            reference = path if held is None else held
        if isinstance(reference, (bytes, bytearray, memoryview)):
            return bytes(reference)
        if isinstance(reference, Path):
            reference = str(reference)
        if isinstance(reference, str) and reference[:5].lower() == "data:":
            return _from_address(reference)
        if isinstance(reference, str) and reference:
            path = resolve_inside(self.root, reference)
            # As it is named: a link may come to point elsewhere.
            touch(self.root / reference)
            return path
        raise DataError("no file named", f"{type(reference).__name__}, where a path or bytes are needed")


def _from_address(address: str) -> bytes:
    """The bytes of a base64 `data:` address (RFC 2397)."""
    head, comma, body = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError("bad data address", "only `data:<type>;base64,<bytes>` is read")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("bad data address", str(error)) from error
