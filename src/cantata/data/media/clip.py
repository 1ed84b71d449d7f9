"""A video file as a timeline: which frame is shown at a moment, found by seeking.

Times are whole ticks of the stream's time base. A frame is shown from its own time until the next frame's;
the clip begins with the first frame that can be decoded and ends with the last one's duration. Decoding uses
one thread: what shares a machine are worker processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from types import TracebackType
from typing import IO, Any, NoReturn

import av
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame

from cantata.core.samples import DataError

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
"""FFmpeg's names of what is looked for in a file. Playlists stay closed: they make it open other files."""

BROKEN = (av.FFmpegError, OSError, ValueError, LookupError, ArithmeticError, AssertionError, TypeError)
"""What PyAV raises on damaged files."""

MISSING_SHARE = Fraction(1, 20)
"""Share of the length a file declares that may be missing before it counts as truncated."""


@contextmanager
def decoding(reason: str) -> Iterator[None]:
    """Errors of the decoder as a `DataError` with this reason."""
    try:
        yield
    except MemoryError as error:
        raise DataError("video too large", "out of memory") from error
    except BROKEN as error:
        raise DataError(reason, f"{type(error).__name__}: {error}") from error


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError(f"the file refers to another file: {url}")


class Clip:
    """One video stream, open; use as a context manager.

    Args:
        file: opened for reading bytes.
        max_decoded: frames to decode at most while it is open, whether they are asked for or lie between.
        max_pixels: size of the largest frame to decode.

    Raises `DataError`: "not a video", "corrupt video", "no video stream", "unsupported video codec",
    "no frames", "truncated video", "video too large", "video too long".
    """

    def __init__(self, file: IO[bytes], max_decoded: int, max_pixels: int) -> None:
        self._max_decoded = max_decoded
        self._decoded = 0
        self._blind_seeks = True
        with decoding("corrupt video"):
            try:
                self._container = _open(file)
            except av.error.ArgumentError as error:
                raise DataError("not a video", "none of the containers that are read") from error
            self._read_timeline(max_pixels)

    def _read_timeline(self, max_pixels: int) -> None:
        # A sound file's cover counts as a video stream too.
        streams = (s for s in self._container.streams.video if Disposition.attached_pic not in s.disposition)
        stream = next(streams, None)
        if stream is None or stream.time_base is None:
            raise DataError("no video stream")
        if stream.codec_context is None:
            raise DataError("unsupported video codec")
        pixels = stream.codec_context.width * stream.codec_context.height
        if pixels > max_pixels:
            raise DataError("video too large", f"{pixels} pixels a frame, the limit is {max_pixels}")
        self._stream = stream
        stream.codec_context.thread_count = 1
        # The stream may say something else than its header.
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        self.time_base = Fraction(stream.time_base)
        # AVI stores no presentation times: where its frames are reordered they are counted instead.
        reordered = stream.codec_context.codec.name in ("h264", "hevc") and stream.codec_context.has_b_frames
        self._counted = self._container.format.name == "avi" and reordered
        # MPEG program streams time only some of their packets: after a seek the others are guessed anew.
        self._linear = self._counted or self._container.format.name == "mpeg"
        first = next(self._frames(None), None)
        if first is None:
            raise DataError("no frames")
        self.origin = _time(first)
        self.end = self._find_end(self.origin + 1)
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = Discard.all

    def _find_end(self, least: int) -> int:
        """Where the last frame's duration ends, and a check that the file holds what its header declares."""
        stream, container = self._stream, self._container
        own = stream.duration is not None
        length = stream.duration if own else None
        if length is None and container.duration is not None:
            length = int(Fraction(container.duration, av.time_base) / self.time_base)
        if container.format.name == "avi":
            # Its tick is a frame. Newer libraries shorten the duration to what is there, not this number.
            length = max(length or 0, stream.frames) or None
        start = stream.start_time if stream.start_time is not None else self.origin
        last = None if length is None else self._last_packets(start + length)
        end, longest = last or self._last_packets(None) or (least, least)
        there = (end if own else longest) - min(start, 0)
        if length is not None and there < length * (1 - MISSING_SHARE):
            seconds = [float(ticks * self.time_base) for ticks in (there, length)]
            raise DataError("truncated video", "{:.2f} s of {:.2f} s are there".format(*seconds))
        return max(end, least)

    def _last_packets(self, moment: int | None) -> tuple[int, int] | None:
        """Ends of the last frame and of the longest stream, from the packets that follow `moment`.

        Frames are stored after the keyframe they follow in time, so the last one is found behind any
        keyframe. None where there is no keyframe.
        """
        self._seek(moment)
        keyframe_seen = False
        last = (-1 << 63, 0)
        longest = Fraction(0)
        for packet in self._container.demux():
            if packet.is_corrupt:
                raise DataError("truncated video", "a packet at the end is cut off")
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None or packet.is_discard:
                continue
            longest = max(longest, (time + (packet.duration or 0)) * Fraction(packet.time_base))
            if packet.stream.index == self._stream.index:
                keyframe_seen = keyframe_seen or packet.is_keyframe
                last = max(last, (time, packet.duration or 1))
        return (sum(last), math.floor(longest / self.time_base)) if keyframe_seen else None

    def frames_at(self, moments: list[int]) -> Iterator[VideoFrame]:
        """The frame shown at each moment (ticks, ascending), each frame once."""
        with decoding("corrupt video"):
            frames: Iterator[VideoFrame] = iter(())
            shown: VideoFrame | None = None
            following: VideoFrame | None = None
            yielded: int | None = None
            for moment in moments:
                if shown is None or (following is not None and self._worth_seeking(following, moment)):
                    reached = None if following is None else _time(following)
                    frames, shown = self._start(moment)
                    self._blind_seeks = self._blind_seeks and (reached is None or _time(shown) >= reached)
                    following = next(frames, None)
                while following is not None and _time(following) <= moment:
                    shown, following = following, next(frames, None)
                if _time(shown) != yielded:
                    yielded = _time(shown)
                    if shown.is_corrupt:
                        raise DataError("corrupt video", f"the frame at {self.seconds(yielded):.2f} s")
                    yield shown

    def keyframes(self) -> list[int]:
        """Times of the frames that the file stores whole, ascending; reads the file, decodes nothing."""
        with decoding("corrupt video"):
            if self._counted:
                return [_time(frame) for frame in self._frames(None) if frame.key_frame]
            self._seek(None)
            packets = self._container.demux(self._stream)
            return sorted(
                packet.pts
                for packet in packets
                if packet.is_keyframe and not packet.is_discard and packet.pts is not None
            )

    def seconds(self, moment: int) -> float:
        """From ticks to seconds from the clip's first frame."""
        return float((moment - self.origin) * self.time_base)

    def _worth_seeking(self, following: VideoFrame, moment: int) -> bool:
        """Whether there is a keyframe to start from between the next frame and the moment."""
        if self._linear:
            return False
        entries = self._stream.index_entries
        place = entries.search_timestamp(moment)
        if place < 0:
            # No index: a keyframe every ten seconds is what encoders make where nothing else is asked for.
            # Where such a seek fell back once, the file is read on to the end.
            return self._blind_seeks and (moment - _time(following)) * self.time_base > 10
        return bool(entries[place].timestamp > _time(following))

    def _start(self, moment: int) -> tuple[Iterator[VideoFrame], VideoFrame]:
        """Frames from a keyframe at or before the moment on, the first of them apart.

        A container's idea of where to land may be too late (its index may hold decoding times, and the
        first frames after an open group of pictures cannot be decoded): then it is asked for an earlier
        place, and at last everything is decoded.
        """
        back = 0
        while not self._linear and moment - back > self.origin:
            frames = self._frames(moment - back)
            first = next(frames, None)
            if first is not None and _time(first) <= moment:
                return frames, first
            back = max(2 * back, int(1 / self.time_base))
        frames = self._frames(None)
        first = next(frames, None)
        if first is None:
            raise DataError("no frames")
        return frames, first

    def _frames(self, moment: int | None) -> Iterator[VideoFrame]:
        """Decoded frames in the order of time, from the keyframe at or before the moment; None: the first.

        Frames that are shown before their keyframe are left out: they need frames that were not decoded.
        """
        self._seek(moment)
        keyframe: int | None = None
        count = 0
        for packet in self._container.demux(self._stream):
            if keyframe is None:
                if not packet.is_keyframe:
                    continue
                keyframe = packet.pts if packet.pts is not None else packet.dts
                if keyframe is None:
                    raise DataError("corrupt video", "a packet has no time")
            for frame in packet.decode():
                self._decoded += 1
                if self._decoded > self._max_decoded:
                    raise DataError(
                        "video too long", f"more than {self._max_decoded} frames to decode; take a range"
                    )
                if self._counted:
                    frame.pts = keyframe + count
                    count += 1
                if _time(frame) >= keyframe:
                    yield frame

    def _seek(self, moment: int | None) -> None:
        """To the keyframe at or before the moment; to the start of the file where there is none."""
        start = self._stream.start_time or 0
        early = start - int(10 / self.time_base)
        for place in [early, start] if moment is None or self._linear else [moment, early, start]:
            try:
                self._container.seek(place, stream=self._stream)
                return
            except av.FFmpegError as error:
                refused = error
        raise refused

    def __enter__(self) -> Clip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()


def _open(file: IO[bytes]) -> InputContainer:
    options: dict[str, Any] = {"format_whitelist": CONTAINERS}
    return av.open(file, "r", container_options=options, metadata_errors="replace", io_open=_refuse)


def _time(frame: VideoFrame) -> int:
    moment = frame.pts if frame.pts is not None else frame.dts
    if moment is None:
        raise DataError("corrupt video", "a frame has no time")
    return moment
