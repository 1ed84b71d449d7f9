import numpy as np
import pytest
from PIL import Image

from cantata.core.samples import DataError
from cantata.models.aria.crops import (
    SPLIT_RATIOS,
    Resampling,
    fitted_size,
    patches,
    resized,
    split,
    split_ratio,
)


def gradient(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_nineteen_ratios() -> None:
    assert len(set(SPLIT_RATIOS)) == len(SPLIT_RATIOS) == 19
    assert max(across * down for across, down in SPLIT_RATIOS) == 8


@pytest.mark.parametrize(
    ("size", "ratio"),
    [
        ((1224, 1584), (2, 3)),
        ((1584, 1224), (3, 2)),
        ((500, 500), (2, 2)),
        ((100, 2000), (1, 8)),
        ((4000, 100), (8, 1)),
        # Equally near: 1:2 against 2:4, 2:1 against 4:2, told apart by the square of the height.
        ((500, 1000), (1, 2)),
        ((1000, 2000), (2, 4)),
        ((2000, 1000), (2, 1)),
        ((8000, 4000), (4, 2)),
    ],
)
def test_ratio(size: tuple[int, int], ratio: tuple[int, int]) -> None:
    assert split_ratio(*size, 980) == ratio


def test_a_letter_page_at_980_gives_seven_crops() -> None:
    page = gradient(1224, 1584)
    pieces = split(page, 980, Resampling.pillow)
    assert pieces[0] is page
    assert [piece.size for piece in pieces[1:]] == [(980, 980)] * 6
    stretched = np.asarray(page.resize((1960, 2940), Image.Resampling.BICUBIC))
    rejoined = np.vstack([np.hstack([np.asarray(pieces[1 + 2 * r + c]) for c in range(2)]) for r in range(3)])
    assert np.array_equal(rejoined, stretched)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((1000, 500), (490, 336)), ((1000, 900), (490, 441)), ((9, 1000), (336, 490)), ((64, 64), (490, 490))],
)
def test_fitted_size(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fitted_size(*size, 490, 336) == fitted


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (41, 64), (200, 130)])
def test_patches_equal_the_slow_twin(size: tuple[int, int]) -> None:
    """Pad to the whole square, cut every patch by loops, keep those with a valid pixel."""
    image = gradient(*size)
    found, rows, columns = patches(image, 64, 24, 8, Resampling.pillow)
    width, height = fitted_size(*size, 64, 24)
    square = np.zeros((64, 64, 3), dtype=np.uint8)
    square[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    expected = [
        square[top : top + 8, left : left + 8].transpose(2, 0, 1).reshape(-1)
        for top in range(0, 64, 8)
        for left in range(0, 64, 8)
        if top < height and left < width
    ]
    assert rows * columns == len(expected)
    assert np.array_equal(found, np.stack(expected))


def test_no_pixels() -> None:
    nothing = Image.new("RGB", (0, 5))
    with pytest.raises(DataError, match="no pixels"):
        patches(nothing, 64, 64, 8, Resampling.pillow)
    with pytest.raises(DataError, match="no pixels"):
        split(nothing, 64, Resampling.pillow)


@pytest.mark.parametrize("size", [(64, 48), (300, 400)])
def test_both_resamplings_agree_but_for_rounding(size: tuple[int, int]) -> None:
    """torch weighs with 16 bits, Pillow with 22: a value may be rounded the other way, in either pass.

    Stretched noise differs by more: what overshoots is cut between the passes, and the order differs.
    """
    image = Image.effect_noise((200, 150), 60).convert("RGB")
    ours, theirs = (resized(image, size, resampling).astype(int) for resampling in Resampling)
    assert ours.shape == (size[1], size[0], 3)
    assert np.abs(ours - theirs).max() <= 2
    assert (ours != theirs).mean() < 0.02
