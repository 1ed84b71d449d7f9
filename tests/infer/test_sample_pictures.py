"""Pictures beside what a model said of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from cantata.core.samples import Video
from cantata.infer.sample_pictures import MOST, SIDE, keep_pictures


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_images_and_first_frames_are_kept_small(tmp_path: Path) -> None:
    parts = ("what?", noise(40, 30), Video((noise(640, 320, 1), noise(640, 320, 2))))
    names = keep_pictures(tmp_path, "a/../b:7", parts)
    assert names == ["pictures/a-..-b-7-0.png", "pictures/a-..-b-7-1.png"]
    with Image.open(tmp_path / names[0]) as small, Image.open(tmp_path / names[1]) as frame:
        assert np.array_equal(np.asarray(small), np.asarray(noise(40, 30)))
        assert frame.size == (SIDE, SIDE // 2)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [Path(name).name for name in names]


def test_what_is_there_stays(tmp_path: Path) -> None:
    [name] = keep_pictures(tmp_path, "emoji:1", [noise(8, 8)])
    before = (tmp_path / name).read_bytes()
    assert keep_pictures(tmp_path, "emoji:1", [noise(8, 8, 5)]) == [name]
    assert (tmp_path / name).read_bytes() == before


def test_many_are_cut(tmp_path: Path) -> None:
    assert len(keep_pictures(tmp_path, "pages:0", [noise(4, 4)] * 9)) == MOST
    assert keep_pictures(tmp_path, "plays:0", ["text alone"]) == []
