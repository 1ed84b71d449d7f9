"""Small videos made on the spot, and the slow way to take frames: decode everything, then look."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cantata.data.media import PdfOptions, Sampling, VideoOptions

VIDEO = VideoOptions(
    sampling=Sampling.uniform,
    num_frames=8,
    fps=2.0,
    max_frames=16,
    start=0.0,
    end=None,
    longest_side=980,
    max_pixels=4_000_000,
    max_decoded=2000,
)
PDF = PdfOptions(pages="all", scale=1.0, max_pages=8, max_pixels=4_000_000)


def picture(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A grey level for each number, and a moving bar."""
    width, height = size
    pixels = np.full((height, width, 3), 16 + number * 7 % 208, dtype=np.uint8)
    pixels[:, number * 3 % width :][:, :6] = 255
    return Image.fromarray(pixels)


def encoded_clip(
    count: int,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    rate: int = 10,
    gop: int = 6,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    turn: int = 0,
    sound: bool = False,
    size: tuple[int, int] = (64, 48),
) -> bytes:
    """A video of `count` numbered pictures; `times` in 1/1000 s make the frame rate variable."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        speaker = output.add_stream("aac", rate=16000) if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_image(picture(number, size))
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = number, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if speaker is not None:
            samples = np.zeros((1, 16000 * 2 * count // rate), dtype=np.float32)
            noise = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            noise.sample_rate, noise.pts = 16000, 0
            output.mux(speaker.encode(noise))
            output.mux(speaker.encode(None))
    return buffer.getvalue()


class Shown(NamedTuple):
    """A decoded frame and when it appears, in seconds from the first one."""

    time: Fraction
    key: bool
    pixels: NDArray[np.uint8]


class Everything:
    """All frames of a file, decoded from the first to the last."""

    def __init__(self, data: bytes) -> None:
        with av.open(io.BytesIO(data)) as container:
            frames = list(container.decode(video=0))
            base = Fraction(frames[0].time_base)
            # Frames come out in the order of time; where a file holds decoding times alone (AVI), sorting
            # them gives back when each is shown.
            times = sorted(frame.pts for frame in frames)
            self.frames = [
                Shown((time - times[0]) * base, frame.key_frame, frame.to_ndarray(format="rgb24"))
                for time, frame in zip(times, frames, strict=True)
            ]
            rate = container.streams.video[0].average_rate
            lasting = frames[-1].duration * base if frames[-1].duration else 1 / Fraction(rate)
            self.end = self.frames[-1].time + lasting

    def at(self, moments: Sequence[Fraction]) -> list[int]:
        """Index of the frame shown at each moment, each once."""
        found: list[int] = []
        for moment in moments:
            shown = max(i for i, frame in enumerate(self.frames) if frame.time <= moment)
            found += [shown] if shown not in found else []
        return found

    def span(self, options: VideoOptions) -> tuple[Fraction, Fraction]:
        end = self.end if options.end is None else min(self.end, Fraction(str(options.end)))
        return Fraction(str(options.start)), end

    def chosen(self, options: VideoOptions) -> list[int]:
        """What `options` should take."""
        start, end = self.span(options)
        if start >= end:
            return []
        if options.sampling is Sampling.keyframe:
            keys = [i for i, frame in enumerate(self.frames) if frame.key and start <= frame.time < end]
            n = options.max_frames
            return keys if len(keys) <= n else [keys[(2 * k + 1) * len(keys) // (2 * n)] for k in range(n)]
        count = options.num_frames
        if options.sampling is Sampling.fps:
            moments = []
            while start + len(moments) / Fraction(str(options.fps)) < end:
                moments.append(start + len(moments) / Fraction(str(options.fps)))
            if len(moments) <= options.max_frames:
                return self.at(moments)
            count = options.max_frames
        return self.at([start + (2 * k + 1) * (end - start) / (2 * count) for k in range(count)])
