import io
from fractions import Fraction

import numpy as np
import pytest

from cantata.core.samples import DataError
from cantata.data.media.clip import Clip, decoding
from tests.data.media.clips import Everything, encoded_clip

OPTIONS = {"x264-params": "bframes=3:scenecut=0"}


@pytest.fixture(scope="module")
def data() -> bytes:
    """30 frames of 0.1 s, every tenth of them stored whole."""
    return encoded_clip(30, gop=10, options=OPTIONS)


def clip(data: bytes, max_decoded: int = 1000, max_pixels: int = 64 * 48) -> Clip:
    return Clip(io.BytesIO(data), max_decoded, max_pixels)


def test_the_timeline(data: bytes) -> None:
    with clip(data) as one:
        assert (one.end - one.origin) * one.time_base == 3
        assert [one.seconds(moment) for moment in one.keyframes()] == [0.0, 1.0, 2.0]


def test_the_frame_shown_at_a_moment_each_once(data: bytes) -> None:
    seconds = [Fraction(text) for text in ("0", "0.05", "0.1", "1.39", "1.4", "2.99")]
    everything = Everything(data)
    with clip(data) as one:
        frames = list(one.frames_at([one.origin + int(second / one.time_base) for second in seconds]))
        assert [round(10 * one.seconds(frame.pts)) for frame in frames] == [0, 1, 13, 14, 29]
        for frame, number in zip(frames, everything.at(seconds), strict=True):
            assert np.array_equal(frame.to_ndarray(format="rgb24"), everything.frames[number].pixels)


def test_only_what_lies_behind_a_keyframe_is_decoded(data: bytes) -> None:
    """The last frame needs its group of ten and no more, besides the first frame that tells the origin."""
    with clip(data, max_decoded=1 + 10) as one:
        assert len(list(one.frames_at([one.end - 1]))) == 1
    with (
        clip(data, max_decoded=1 + 9) as one,
        pytest.raises(DataError, match=r"video too long .*more than 10 frames"),
    ):
        list(one.frames_at([one.end - 1]))


def test_what_cannot_be_opened(data: bytes) -> None:
    with pytest.raises(DataError, match=r"video too large .*3072 pixels a frame, the limit is 3071"):
        clip(data, max_pixels=64 * 48 - 1)
    with pytest.raises(DataError, match=r"^(not a video|corrupt video)"):
        clip(b"#EXTM3U\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")


def test_errors_of_the_decoder_are_reasons() -> None:
    for error, reason in ((ValueError("x"), "corrupt video"), (MemoryError(), "video too large")):
        with pytest.raises(DataError) as caught, decoding("corrupt video"):
            raise error
        assert caught.value.reason == reason
    with pytest.raises(KeyboardInterrupt), decoding("corrupt video"):
        raise KeyboardInterrupt
