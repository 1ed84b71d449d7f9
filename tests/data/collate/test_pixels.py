import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, Message, Part, Video
from cantata.data.collate.pixels import ImageCollator, covering


def grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    if height % 8 or width % 8:
        raise ConfigError(f"{height} x {width} is no multiple of 8")
    return frames, height // 8, width // 8


def collator(sizes: tuple[tuple[int, int], ...] = ((16, 16), (8, 32)), frames: int = 1) -> ImageCollator:
    return ImageCollator(list(sizes), frames, grid)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((40, 40), (16, 16)), ((100, 20), (8, 32)), ((31, 16), (16, 16)), ((33, 16), (8, 32))],
)
def test_the_bucket_of_the_nearest_ratio(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    sample = collator().encode(Document((ramp(*size), "a ramp")), "s:0")
    assert sample.pixels_TCHW.shape == (1, 3, *bucket)
    assert sample.pixels_TCHW.dtype == np.uint8


def test_an_image_of_the_size_stays_as_it_is() -> None:
    image = ramp(16, 16)
    sample = collator().encode(Document((image,)), "s:0")
    assert np.array_equal(sample.pixels_TCHW[0].transpose(1, 2, 0), np.asarray(image))


def test_the_middle_is_kept() -> None:
    wide = covering(ramp(64, 32), (32, 32))
    assert wide.shape == (32, 32, 3)
    assert abs(int(wide[0, 0, 0]) - 64) < 3
    assert abs(int(wide[0, -1, 0]) - 191) < 3
    assert wide[0, 0, 1] < 3
    assert wide[-1, 0, 1] > 252


def test_a_row_is_a_batch() -> None:
    own = pickle.loads(pickle.dumps(collator()))
    samples = [own.encode(Document((ramp(40, 40 - n),)), f"s:{n}") for n in range(3)]
    batch = own.collate([own.row(samples)], 3)
    assert batch.pixels_BTCHW.shape == (3, 1, 3, 16, 16)
    assert batch.keys == ("s:0", "s:1", "s:2")
    assert batch.is_real_B.all()
    assert (batch.num_tokens, batch.num_targets, batch.target_weight) == (12, 12, 3 * 3 * 256.0)
    assert batch.to("cpu").pixels_BTCHW.dtype == torch.uint8


def test_a_filler_counts_for_nothing() -> None:
    batch = collator().collate([collator().row([])], 3)
    assert not batch.is_real_B.any()
    assert (len(batch.pixels_BTCHW), batch.num_tokens, batch.target_weight) == (1, 0, 0.0)


def test_clips_give_their_first_frames() -> None:
    clip = Video(tuple(ramp(16, 16 + 16 * (n % 2)) for n in range(5)))
    own = collator(frames=4)
    assert own.encode(Document((clip,)), "s:0").pixels_TCHW.shape == (4, 3, 16, 16)
    assert own.encode(Document((ramp(16, 16),)), "s:0").pixels_TCHW.shape == (1, 3, 16, 16)
    assert own.codes == {(1, 16, 16): 4, (4, 16, 16): 16, (1, 8, 32): 4, (4, 8, 32): 16}


@pytest.mark.parametrize(
    ("parts", "frames", "reason"),
    [
        (("only text",), 1, "not one image"),
        ((ramp(8, 8), ramp(8, 8)), 1, "not one image"),
        ((Video((ramp(8, 8),) * 3),), 4, "short clip"),
        ((Video((ramp(8, 8),) * 3),), 1, "a clip"),
        ((Codes(np.zeros((1, 2, 2), np.int64)),), 1, "not pixels"),
    ],
)
def test_what_is_no_image_is_told(parts: tuple[Part, ...], frames: int, reason: str) -> None:
    for example in (Document(parts), Chat((Message("user", parts),))):
        with pytest.raises(DataError, match=reason):
            collator(frames=frames).encode(example, "s:0")


def test_sizes_that_the_model_cannot_take() -> None:
    with pytest.raises(ConfigError, match="no multiple of 8"):
        collator(((20, 16),))
    with pytest.raises(ConfigError, match=r"collator\.sizes is empty"):
        collator(())
    with pytest.raises(ConfigError, match=r"collator\.frames=0"):
        collator(frames=0)
