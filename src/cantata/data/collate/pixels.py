"""Images and clips of one size, stacked.

B  images or clips    T  frames    C  channels    H, W  rows and columns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, DataError, Example, Part, PixelSample, Video
from cantata.core.types import PixelBatch, RowInfo
from cantata.data.collate.handed import by_handle
from cantata.data.rows import RowMaker
from cantata.data.size_groups import SizeGroups

Grid = Callable[[int, int, int], tuple[int, int, int]]
"""From frames, rows and columns of pixels to those of codes; `ConfigError` for what a model cannot take."""


class PixelRow(NamedTuple):
    """Images of one size, cheap to hand from a worker process to the trainer."""

    pixels_BTCHW: NDArray[np.uint8] | Tensor
    keys: tuple[str, ...]
    info: RowInfo | None


class ImageCollator:
    """Brings each image to the nearest of a few sizes and stacks those of one size.

    The nearest size is the one whose ratio of sides is closest to the image's. The image is scaled until it
    covers that size and its middle is kept; what random crops and flips a source wants are its `augment`. A
    sample must hold one image or one clip; its text does not matter. Frames of a clip are treated alike.

    Args:
        sizes: (rows, columns) in pixels, each a bucket.
        frames: frames of a clip; a longer one gives its first ones, a shorter one is an error. Images are
            clips of one frame, and stay that.
        grid: of the model; says how many codes an image becomes.

    Raises `ConfigError` for sizes that the model cannot take.
    """

    row_maker: type[RowMaker] = SizeGroups

    def __init__(self, sizes: list[tuple[int, int]], frames: int, grid: Grid) -> None:
        if not sizes:
            raise ConfigError("collator.sizes is empty; name at least one [rows, columns]")
        if frames < 1:
            raise ConfigError(f"collator.frames={frames} must be at least 1")
        self.sizes = [(height, width) for height, width in sizes]
        self.frames = frames
        self.codes: dict[tuple[int, ...], int] = {
            (count, *size): math.prod(grid(count, *size)) for size in self.sizes for count in {1, frames}
        }
        """Codes of a sample by its (frames, rows, columns)."""

    def encode(self, example: Example, key: str) -> PixelSample:
        """Raises `DataError` where there is not exactly one image or clip, or a clip is too short."""
        visual = visual_parts(example)
        if len(visual) != 1:
            raise DataError("not one image", f"it holds {len(visual)} images or clips")
        return PixelSample(key, self.pixels(visual[0]))

    def pixels(self, part: Part) -> NDArray[np.uint8]:
        """An image or a clip at the nearest size, (T, C, H, W). Raises `DataError` as `encode`."""
        frames = self._frames(part)
        size = self.nearest(frames[0].size)
        stacked = np.stack([covering(frame, size) for frame in frames])
        return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))

    def nearest(self, size: tuple[int, int]) -> tuple[int, int]:
        """The bucket (rows, columns) for an image of Pillow's (columns, rows); of equals the first."""
        ratio = math.log(size[0] / size[1])
        return min(self.sizes, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - ratio))

    def row(self, samples: Sequence[PixelSample], info: RowInfo | None = None) -> PixelRow:
        """Samples of one size; of none, a filler that counts for nothing."""
        if not samples:
            return PixelRow(np.zeros((1, 1, 3, *self.sizes[0]), dtype=np.uint8), (), info)
        pixels = np.stack([sample.pixels_TCHW for sample in samples])
        return PixelRow(by_handle(pixels), tuple(sample.key for sample in samples), info)

    def collate(self, rows: Sequence[PixelRow], sequence_length: int) -> PixelBatch:
        """The one row of a micro-batch: `sequence_length` images, or fewer at the end of held-out data."""
        [row] = rows
        pixels_BTCHW = torch.as_tensor(row.pixels_BTCHW)
        count, frames, _, *size = pixels_BTCHW.shape
        return PixelBatch(
            pixels_BTCHW,
            is_real_B=torch.full((count,), bool(row.keys)),
            keys=row.keys,
            codes_per_image=self.codes[(frames, *size)],
            rows=() if row.info is None else (row.info,),
        )

    def _frames(self, part: Any) -> Sequence[Image.Image]:
        if isinstance(part, Image.Image):
            return (part,)
        if not isinstance(part, Video):
            raise DataError("not pixels", "it is codes already")
        if self.frames == 1:
            raise DataError("a clip", "collator.frames=1 takes images alone")
        if len(part.frames) < self.frames:
            raise DataError("short clip", f"{len(part.frames)} frames, {self.frames} wanted")
        return part.frames[: self.frames]


def visual_parts(example: Example) -> list[Part]:
    """Images and clips, in reading order."""
    messages = example.messages if isinstance(example, Chat) else (example,)
    return [part for message in messages for part in message.parts if not isinstance(part, str)]


def covering(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of an image that was scaled until it covers (rows, columns), as (H, W, C)."""
    height, width = size
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)
