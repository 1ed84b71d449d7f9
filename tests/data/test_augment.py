import dataclasses
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, Document, Message, Video
from cantata.data.augment import Augment, CropFlipJitter, Draw, NullPrompt, RandomArea, augmented

OFF = CropFlipJitter(
    min_area=1.0, max_stretch=1.0, flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0
)
ALL = CropFlipJitter(
    min_area=0.4, max_stretch=1.3, flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1
)
DRAW = Draw(7, "photos", 3, 0)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def changed(augment: Augment, draw: Draw = DRAW, image: Image.Image = NOISE) -> Image.Image:
    example = augmented(Document((image,)), augment, draw)
    assert isinstance(example, Document)
    [part] = example.parts
    assert isinstance(part, Image.Image)
    return part


def test_off_changes_nothing() -> None:
    assert changed(OFF) == NOISE


@pytest.mark.parametrize(
    "change",
    [
        {"min_area": 0.5},
        {"max_stretch": 1.5},
        {"flip": 1.0},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"hue": 0.3},
    ],
)
def test_each_change_alone_keeps_the_size(change: dict[str, float]) -> None:
    image = changed(dataclasses.replace(OFF, **change))
    assert image != NOISE
    assert (image.mode, image.size) == ("RGB", NOISE.size)


def test_a_flip_is_a_mirror_and_half_of_them_happen() -> None:
    flipped = [
        changed(dataclasses.replace(OFF, flip=0.5), dataclasses.replace(DRAW, index=i)) for i in range(200)
    ]
    mirror = NOISE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert set(map(Image.Image.tobytes, flipped)) == {NOISE.tobytes(), mirror.tobytes()}
    assert 70 < sum(image == mirror for image in flipped) < 130


def test_switching_one_change_off_leaves_the_others() -> None:
    without = dataclasses.replace(ALL, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    flipped = changed(dataclasses.replace(without, min_area=1.0, max_stretch=1.0)) != NOISE
    crop = changed(dataclasses.replace(without, flip=0.0))
    assert changed(without) == (crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else crop)


def test_crops_lie_inside_and_differ() -> None:
    """A picture that is a ramp in each direction tells where a crop was taken."""
    ramp = np.zeros((200, 200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None], np.arange(200)[:, None]
    crop = dataclasses.replace(OFF, min_area=0.25, max_stretch=1.5)
    boxes = []
    for index in range(50):
        pixels = np.asarray(
            changed(crop, dataclasses.replace(DRAW, index=index), Image.fromarray(ramp))
        ).astype(int)
        width, height = (pixels[100, -1, 0] - pixels[100, 0, 0], pixels[-1, 100, 1] - pixels[0, 100, 1])
        boxes.append((pixels[100, 0, 0], pixels[0, 100, 1], width, height))
        assert 0.2 <= width * height / 199**2 <= 1
        assert 1 / 1.6 < width / height < 1.6
    assert len(set(boxes)) == 50


def test_the_draw_decides_everything() -> None:
    same = changed(ALL)
    assert changed(pickle.loads(pickle.dumps(ALL))) == same
    for other in ({"seed": 8}, {"source": "photo"}, {"index": 4}, {"epoch": 1}):
        assert changed(ALL, dataclasses.replace(DRAW, **other)) != same
    # Nothing runs together: neither names and numbers, nor numbers.
    assert changed(ALL, Draw(1, "a", 11, 1)) != changed(ALL, Draw(1, "a", 1, 11))


def test_another_process_draws_the_same() -> None:
    code = "from tests.data.test_augment import *; print(changed(ALL).tobytes().hex())"
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert len({run.stdout for run in runs}) == 1


def test_numbers_stay_the_same_over_versions() -> None:
    assert DRAW.generator(0).random(2).tolist() == pytest.approx(NUMBERS, abs=1e-12)


NUMBERS = [0.23881012185091344, 0.4604903109589248]


def test_pictures_differ_frames_of_a_clip_do_not_and_text_stays() -> None:
    chat = Chat(
        (
            Message("user", (NOISE, "look", NOISE, Video((NOISE, NOISE.copy(), NOISE.copy())))),
            Message("assistant", ("yes", NOISE), 0.5),
        )
    )
    example = augmented(chat, ALL, DRAW)
    assert isinstance(example, Chat)
    (first, text, second, clip), (answer, third) = (message.parts for message in example.messages)
    assert (text, answer, example.messages[1].weight) == ("look", "yes", 0.5)
    assert isinstance(clip, Video)
    assert clip.frames[0] == clip.frames[1] == clip.frames[2]
    parts: list[Any] = [first, second, clip.frames[0], third, NOISE]
    assert len({part.tobytes() for part in parts}) == 5
    assert chat.messages[0].parts[0] is NOISE


@pytest.mark.parametrize(
    "change", [{"min_area": 0.0}, {"max_stretch": 0.9}, {"flip": 1.1}, {"hue": 0.6}, {"contrast": -0.1}]
)
def test_bad_values(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(ALL, **change)


def test_codes_stay_as_they_are_and_draw_nothing() -> None:
    codes = Codes(np.zeros((1, 2, 2), dtype=np.int64))
    mixed = augmented(Document((codes, NOISE, "text")), ALL, DRAW)
    alone = augmented(Document((NOISE,)), ALL, DRAW)
    assert isinstance(mixed, Document)
    assert isinstance(alone, Document)
    assert mixed.parts[0] is codes
    assert np.array_equal(np.asarray(mixed.parts[1]), np.asarray(alone.parts[0]))


def test_a_null_prompt_leaves_texts_out_in_its_share_of_draws() -> None:
    codes = Codes(np.zeros((1, 2, 2), dtype=np.int64))
    example = Document(("a cat", codes, "on a mat"))
    draws = [dataclasses.replace(DRAW, index=index) for index in range(400)]
    found = [augmented(example, NullPrompt(0.25), draw) for draw in draws]
    without = [one for one in found if one != example]
    assert all(one == Document((codes,)) for one in without)
    assert 70 < len(without) < 130
    assert found == [augmented(example, NullPrompt(0.25), draw) for draw in draws], "a draw decides"
    epochs = [augmented(example, NullPrompt(0.25), dataclasses.replace(DRAW, epoch=e)) for e in range(40)]
    assert {len(one.parts) for one in epochs if isinstance(one, Document)} == {1, 3}


def test_a_null_prompt_at_its_limits_and_in_conversations() -> None:
    example = Document(("a cat", Codes(np.zeros((1, 2, 2), dtype=np.int64))))
    chat = Chat((Message("user", ("a cat",)), Message("assistant", ("yes",))))
    for index in range(20):
        draw = dataclasses.replace(DRAW, index=index)
        assert augmented(example, NullPrompt(0.0), draw) is example
        assert augmented(example, NullPrompt(1.0), draw) == Document(example.parts[1:])
        assert augmented(chat, NullPrompt(1.0), draw) is chat
    with pytest.raises(ConfigError, match=r"augment.share=1.5 must be from 0 to 1"):
        NullPrompt(1.5)


def test_areas_share_the_patches_and_shapes_stay() -> None:
    augment = RandomArea(patch_size=4, least_log2=2, most_log2=5)
    image = Image.new("RGB", (60, 30))
    sizes = [augment(image, np.random.default_rng(seed)).size for seed in range(600)]
    areas = [width * height / 16 for width, height in sizes]
    assert all(width / height == pytest.approx(2.0, rel=0.1) for width, height in sizes)
    by_power = {n: sum(area for area in areas if round(math.log2(area)) == n) for n in range(2, 6)}
    assert sum(by_power.values()) == pytest.approx(sum(areas))
    assert all(0.7 < share / (sum(areas) / 4) < 1.3 for share in by_power.values())
    assert augment(image, np.random.default_rng(3)).size == sizes[3]


@pytest.mark.parametrize("values", [(0, 7, 12), (14, 8, 7), (14, -1, 3), (14, 7, 21)])
def test_areas_that_mean_nothing(values: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="least_log2"):
        RandomArea(*values)
