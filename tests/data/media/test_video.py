import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.media import Sampling, VideoOptions
from cantata.data.media.video import read_video, spread
from tests.data.helpers import encoded
from tests.data.media.clips import VIDEO, Everything, encoded_clip

CLIPS = Path(__file__).parents[4] / "shared/data/chat/mllm_demo_data"

OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}
B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}
REFRESH = {"x264-params": "intra-refresh=1:bframes=0:keyint=8"}
UNEVEN = list(itertools.accumulate([0, *([40, 40, 500, 7, 93, 1200, 33, 33] * 5)]))[:40]

MADE: dict[str, dict[str, Any]] = {
    "mp4": {"options": B_FRAMES},
    "mp4, open groups": {"options": OPEN_GOP},
    "mp4, no keyframe but the first": {"gop": 1000, "options": B_FRAMES},
    "mp4, intra refresh": {"gop": 8, "options": REFRESH},
    "mp4, variable rate": {"times": UNEVEN, "options": B_FRAMES},
    "mp4, longer sound": {"options": B_FRAMES, "sound": True},
    "mp4, h265": {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3"}},
    "mp4, fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": B_FRAMES},
    "mkv": {"container": "matroska", "options": OPEN_GOP},
    "mkv, longer sound": {"container": "matroska", "options": B_FRAMES, "sound": True},
    "mkv, variable rate": {"container": "matroska", "times": UNEVEN},
    "webm": {
        "container": "webm",
        "codec": "libvpx-vp9",
        "options": {"deadline": "realtime", "cpu-used": "8"},
    },
    "avi": {"container": "avi", "codec": "mpeg4"},
    "avi, B frames": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "avi, h264": {"container": "avi", "options": B_FRAMES},
    "ts": {"container": "mpegts", "options": OPEN_GOP},
    "mpeg": {"container": "mpeg", "codec": "mpeg2video", "rate": 25, "options": {"bf": "2"}},
    "wmv": {"container": "asf", "codec": "wmv2"},
    "flv": {"container": "flv", "options": B_FRAMES},
    "gif": {"container": "gif", "codec": "gif"},
}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[bytes, Everything]]:
    clips = {name: encoded_clip(40, **how) for name, how in MADE.items()}
    return {name: (data, Everything(data)) for name, data in clips.items()}


def ways() -> list[VideoOptions]:
    """Every sampling over the whole clip and over ranges that begin and end between and on frames."""
    ranges = [(0.0, None), (0.3, 2.0), (1.234, 2.345), (3.9, None), (2.0, 100.0)]
    whats = [
        {"sampling": Sampling.uniform, "num_frames": 3},
        {"sampling": Sampling.uniform, "num_frames": 16},
        {"sampling": Sampling.fps, "fps": 2.0},
        {"sampling": Sampling.fps, "fps": 0.7},
        {"sampling": Sampling.fps, "fps": 29.97},
        {"sampling": Sampling.keyframe},
        {"sampling": Sampling.keyframe, "max_frames": 3, "num_frames": 3},
    ]
    return [
        dataclasses.replace(VIDEO, start=start, end=end, **what) for start, end in ranges for what in whats
    ]


def assert_exact(data: bytes, everything: Everything, options: VideoOptions) -> None:
    wanted = everything.chosen(options)
    if not wanted:
        with pytest.raises(DataError, match="empty time range"):
            read_video(data, options)
        return
    frames = read_video(data, options).frames
    assert len(frames) == len(wanted), options
    for place, (image, number) in enumerate(zip(frames, wanted, strict=True)):
        assert np.array_equal(np.asarray(image), everything.frames[number].pixels), (options, wanted, place)


@pytest.mark.parametrize("name", MADE)
def test_the_same_frames_as_decoding_everything(made: dict[str, tuple[bytes, Everything]], name: str) -> None:
    for options in ways():
        assert_exact(*made[name], options)


def test_the_users_files() -> None:
    if not CLIPS.is_dir():
        pytest.skip(f"{CLIPS} is absent")
    for name in ("1.mp4", "2.avi", "3.mp4", "4.mp4"):
        data = (CLIPS / name).read_bytes()
        everything = Everything(data)
        for options in (VIDEO, dataclasses.replace(VIDEO, sampling=Sampling.fps, start=1.0, end=3.3)):
            assert_exact(data, everything, options)
            assert read_video(CLIPS / name, options) == read_video(data, options)


def test_a_seek_spares_most_of_a_long_file() -> None:
    long = encoded_clip(600, gop=30, options={"x264-params": "bframes=3:scenecut=0"})
    options = dataclasses.replace(VIDEO, num_frames=4, max_decoded=200)
    assert_exact(long, Everything(long), options)
    with pytest.raises(DataError, match="video too long"):
        read_video(long, dataclasses.replace(options, max_decoded=50))


def test_every_frame_once_where_more_are_asked_for() -> None:
    short = encoded_clip(3)
    assert len(read_video(short, VIDEO).frames) == 3
    assert len(read_video(short, dataclasses.replace(VIDEO, sampling=Sampling.fps, fps=99.0)).frames) == 3
    assert len(read_video(encoded_clip(1), VIDEO).frames) == 1


@pytest.mark.parametrize("turn", [90, 180, 270, -90])
def test_turned_as_the_metadata_says(turn: int) -> None:
    lying = np.asarray(read_video(encoded_clip(2, gop=1), VIDEO).frames[1])
    upright = np.asarray(read_video(encoded_clip(2, gop=1, turn=turn), VIDEO).frames[1])
    # Display rotation counts counterclockwise, and so does rot90.
    assert np.array_equal(upright, np.rot90(lying, turn // 90))


def test_large_frames_are_shrunk_and_huge_ones_refused() -> None:
    clip = encoded_clip(2, size=(128, 64))
    assert read_video(clip, dataclasses.replace(VIDEO, longest_side=32)).frames[0].size == (32, 16)
    with pytest.raises(DataError, match="video too large"):
        read_video(clip, dataclasses.replace(VIDEO, max_pixels=128 * 64 - 1))


def cover_only() -> bytes:
    """A sound file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    return buffer.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty video"),
        (b"just some text\n" * 40, "corrupt video|not a video"),
        (PLAYLIST, "not a video|corrupt video"),
        (CONCAT, "not a video|corrupt video"),
        (cover_only(), "no video stream"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG"), "not a video|corrupt video"),
    ],
    ids=["empty", "text", "playlist", "list of files", "sound", "picture"],
)
def test_what_is_no_video(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=f"^({reason})"):
        read_video(data, VIDEO)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing video"):
        read_video(tmp_path / "absent.mp4", VIDEO)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["mp4, header first", "mkv", "avi", "avi, h264"])
def test_truncated_files_are_told(made: dict[str, tuple[bytes, Everything]], name: str, share: float) -> None:
    first = {"container_options": {"moov_size": "8000"}}
    data = encoded_clip(40, **first) if name == "mp4, header first" else made[name][0]
    with pytest.raises(DataError, match=r"^(truncated video|corrupt video|no frames)"):
        read_video(data[: int(len(data) * share)], VIDEO)


@pytest.mark.parametrize(
    ("overrides", "frames"),
    [
        ({}, 8),
        ({"num_frames": 3}, 3),
        ({"fps": 1}, 4),
        ({"fps": 1.5, "start": 2}, 3),
        ({"sampling": "keyframe"}, 7),
        ({"num_frames": None, "start": None}, 8),
    ],
)
def test_a_sample_may_say_more(
    made: dict[str, tuple[bytes, Everything]], overrides: dict[str, Any], frames: int
) -> None:
    assert len(read_video(made["mp4"][0], VIDEO.of_sample(overrides)).frames) == frames


@pytest.mark.parametrize(
    "overrides",
    [
        {"frames": 3},
        {"num_frames": "3"},
        {"num_frames": True},
        {"num_frames": 17},
        {"num_frames": 0},
        {"fps": 0},
        {"fps": float("nan")},
        {"start": -1.0},
        {"start": 2.0, "end": 1.0},
        {"start": float("inf")},
        {"sampling": "best"},
        {"max_pixels": 9},
    ],
)
def test_bad_options_of_a_sample(overrides: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^bad video options"):
        VIDEO.of_sample(overrides)


@pytest.mark.parametrize(
    "change", [{"num_frames": 0}, {"num_frames": 17}, {"fps": 0.0}, {"start": -1.0}, {"end": 0.0}]
)
def test_bad_options_in_the_config(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(VIDEO, **change)


def test_spread() -> None:
    assert spread(range(9), 3) == [1, 4, 7]
    assert spread(range(2), 3) == [0, 1]
