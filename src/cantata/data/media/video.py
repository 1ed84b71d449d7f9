"""Which frames of a video a model sees, and reading them."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from av.video.frame import VideoFrame
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError, Video
from cantata.data.media.clip import Clip, decoding

T = TypeVar("T")

Sampling = Enum("Sampling", {"uniform": "uniform", "fps": "fps", "keyframe": "keyframe"}, module=__name__)
"""How frames are chosen from the time range: `uniform`, the frames shown in the middle of `num_frames` equal
parts; `fps`, the frames shown at its start and every 1/fps seconds from there; `keyframe`, the frames that
the file stores whole."""

OF_A_SAMPLE = {"sampling": str, "num_frames": int, "fps": float, "start": float, "end": float}
"""What data may say of one video, and the types."""

TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class VideoOptions:
    """How clips become frames. No frame is taken twice, so a short clip gives fewer than were asked for."""

    sampling: Sampling
    """`uniform`, `fps` or `keyframe`."""
    num_frames: int
    """Frames of a clip under `uniform`."""
    fps: float
    """Frames of a second under `fps`."""
    max_frames: int
    """Frames of a clip at most; `fps` and `keyframe` spread as many evenly where there are more, a sample
    that asks for more `num_frames` is refused."""
    start: float
    """Where the range begins, in seconds from the first frame."""
    end: float | None
    """Where it ends, in seconds from the first frame; null: with the clip."""
    longest_side: int
    """Frames with a longer side, in pixels, are shrunk to it. A clip takes up to
    `max_frames * longest_side ** 2 * 3` bytes of memory."""
    max_pixels: int
    """Pixels of a frame as it is stored, at most; larger ones are refused."""
    max_decoded: int
    """Frames that may be decoded for one clip, those between the wanted ones included; a clip that needs
    more is refused."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_frames", "longest_side", "max_pixels", "max_decoded"):
            if getattr(self, name) < 1:
                raise ConfigError(f"video.{name}={getattr(self, name)} must be at least 1")
        if self.num_frames > self.max_frames:
            raise ConfigError(f"video.num_frames={self.num_frames} is above max_frames={self.max_frames}")
        if not 0 < self.fps < math.inf:
            raise ConfigError(f"video.fps={self.fps} must be above 0")
        if not 0 <= self.start < math.inf:
            raise ConfigError(f"video.start={self.start} must be 0 or above")
        if self.end is not None and not self.start < self.end < math.inf:
            raise ConfigError(f"video.end={self.end} must be after video.start={self.start}")

    def of_sample(self, overrides: Mapping[str, Any]) -> VideoOptions:
        """The options of one video, as its sample says (`OF_A_SAMPLE`; null leaves a value as it is).

        `num_frames` alone means `uniform`, `fps` alone `fps`. Raises `DataError` "bad video options".
        """
        values = {name: value for name, value in overrides.items() if value is not None}
        for name, value in values.items():
            kind = OF_A_SAMPLE.get(name)
            if kind is None:
                raise DataError("bad video options", f"{name!r}; known are {', '.join(OF_A_SAMPLE)}")
            allowed = (int, float) if kind is float else kind
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise DataError("bad video options", f"{name}={value!r} is no {kind.__name__}")
        implied = "uniform" if "num_frames" in values else "fps" if "fps" in values else self.sampling.value
        try:
            values["sampling"] = Sampling(values.get("sampling", implied))
            return dataclasses.replace(self, **values)
        except (ConfigError, ValueError) as error:
            raise DataError("bad video options", str(error)) from error


def read_video(source: bytes | Path, options: VideoOptions) -> Video:
    """The chosen frames of a video file: turned as its metadata says, RGB, in the order of time.

    Raises `DataError`: those of `Clip`, "missing video", "empty video", and "empty time range" where the
    clip shows nothing between `start` and `end`.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise DataError("missing video", str(error)) from error
    with file:
        if not file.read(1):
            raise DataError("empty video", "0 bytes")
        file.seek(0)
        with Clip(file, options.max_decoded, options.max_pixels) as clip:
            moments = chosen_moments(clip, options)
            return Video(tuple(to_image(frame, options.longest_side) for frame in clip.frames_at(moments)))


def chosen_moments(clip: Clip, options: VideoOptions) -> list[int]:
    """Moments of the wanted frames in ticks of the clip, ascending. Raises `DataError` "empty time range"."""
    first, last = _ticks(clip, options.start), _ticks(clip, options.end)
    if not first < last:
        raise DataError(
            "empty time range", f"from {options.start} s of a clip of {clip.seconds(clip.end):.2f} s"
        )
    if options.sampling is Sampling.keyframe:
        keyframes = [moment for moment in clip.keyframes() if first <= moment < last]
        if not keyframes:
            raise DataError("empty time range", f"no keyframe from {options.start} s to {options.end} s")
        return spread(keyframes, options.max_frames)
    if options.sampling is Sampling.fps:
        step = 1 / (exact(options.fps) * clip.time_base)
        count = math.ceil((last - first) / step)
        if count <= options.max_frames:
            return [math.floor(first + step * number) for number in range(count)]
    count = options.num_frames if options.sampling is Sampling.uniform else options.max_frames
    part = (last - first) / count
    return [math.floor(first + part * (number + Fraction(1, 2))) for number in range(count)]


def _ticks(clip: Clip, seconds: float | None) -> Fraction:
    """From seconds to ticks of the clip, inside the clip; not rounded. None: the clip's end."""
    if seconds is None:
        return Fraction(clip.end)
    return min(clip.origin + exact(seconds) / clip.time_base, Fraction(clip.end))


def exact(value: float) -> Fraction:
    """The decimal number that was written: 0.3 is 3/10, where the float is a little less."""
    return Fraction(repr(value))


def spread(values: Sequence[T], count: int) -> list[T]:
    """`count` of the values, those in the middle of equal parts; all of them where they are fewer."""
    if len(values) <= count:
        return list(values)
    return [values[(2 * number + 1) * len(values) // (2 * count)] for number in range(count)]


def to_image(frame: VideoFrame, longest_side: int) -> Image.Image:
    """RGB and upright, no side longer than `longest_side`."""
    with decoding("corrupt video"):
        image: Image.Image = frame.to_image(threads=1)  # type: ignore[no-untyped-call]
        turn = TURNS.get(round(frame.rotation / 90) * 90 % 360)
    longest = max(image.size)
    if longest > longest_side:
        width, height = (max(1, round(side * longest_side / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image if turn is None else image.transpose(turn)
