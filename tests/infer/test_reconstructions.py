"""The pictures of reconstructions: which images, where they stand, and that the model stays as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cantata.core.samples import DataError, Document, Example
from cantata.data.collate.pixels import ImageCollator
from cantata.data.config import OnError, TooLong
from cantata.data.held_out import HeldOut
from cantata.data.reading import Source
from cantata.infer.reconstructions import Reconstructions, sheet


class Grey(list[Any]):
    """Images of one colour each; a None cannot be read."""

    def __getitem__(self, index: Any) -> Example:
        image = super().__getitem__(index)
        if image is None:
            raise DataError("corrupt image", "cut off")
        return Document((image,))


class Negative(nn.Module):
    """Reconstructs every image as its negative, and takes note of how it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, pixels_BTCHW: Tensor) -> Any:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(reconstruction_BTCHW=-pixels_BTCHW)


def held_out(images: list[Image.Image | None], sizes: tuple[tuple[int, int], ...] = ((4, 4),)) -> HeldOut:
    sources = {"a": Source(Grey(images), 1.0, OnError.skip, TooLong.drop)} if images else {}
    collator = ImageCollator(list(sizes), 1, lambda *grid: grid)
    shape = {"sequence_length": 2, "micro_batch_size": 1, "window": 1, "rank": 0, "world_size": 1}
    return HeldOut(sources, collator, **shape)


def greys(count: int, size: tuple[int, int] = (4, 4)) -> list[Image.Image | None]:
    return [Image.new("RGB", size, (index * 10,) * 3) for index in range(count)]


def test_images_stand_above_what_is_made_of_them(tmp_path: Path) -> None:
    model = Negative()
    engine: Any = SimpleNamespace(model=model)
    shown = Reconstructions(held_out(greys(3)), tmp_path)(20, engine)
    path = tmp_path / "samples" / "step-00000020.png"
    assert shown.lines == [f"  reconstructions: {path}"]
    assert model.seen == [(False, False)]
    assert model.training
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 4 + 2, 3 * 4 + 2 * 2, 3)
    for column, value in enumerate((0, 10, 20)):
        assert (pixels[:4, column * 6 : column * 6 + 4] == value).all()
        assert (pixels[6:, column * 6 : column * 6 + 4] == 255 - value).all()


def test_unreadable_ones_are_passed_over_and_sizes_do_not_mix(tmp_path: Path) -> None:
    images = [None, *greys(2), *greys(1, (8, 4)), *greys(1)]
    probe = Reconstructions(held_out(images, ((4, 4), (4, 8))), tmp_path)
    probe(1, SimpleNamespace(model=Negative()))  # type: ignore[arg-type]
    with Image.open(tmp_path / "samples" / "step-00000001.png") as picture:
        assert picture.size == (3 * 4 + 2 * 2, 2 * 4 + 2)


@pytest.mark.parametrize("images", [[], [None]])
def test_without_images_nothing_is_written(tmp_path: Path, images: list[Image.Image | None]) -> None:
    shown = Reconstructions(held_out(images), tmp_path)(1, SimpleNamespace(model=None))  # type: ignore[arg-type]
    assert (shown.record, shown.lines) == ({}, [])
    assert not (tmp_path / "samples").exists()


def test_many_images_fold_and_values_out_of_range_are_cut() -> None:
    real = torch.zeros(18, 3, 2, 2)
    picture = np.asarray(sheet([real, torch.full_like(real, 7.0)]))
    assert picture.shape == (4 * 2 + 3 * 2, 16 * 2 + 15 * 2, 3)
    assert (picture[4:6, :2] == 255).all()
    assert (picture[8:10, 4:6] == 128).all()
    assert (picture[8:10, 8:] == 255).all()
