"""Positions of patches in images of any size."""

from __future__ import annotations

from cantata.models.aria.vision import patch_position_ids


def test_a_full_grid_is_the_identity() -> None:
    assert patch_position_ids(8, 8, 8).tolist() == list(range(64))


def test_fewer_patches_are_stretched_over_the_grid() -> None:
    assert patch_position_ids(2, 4, 8).tolist() == [0, 2, 4, 6, 32, 34, 36, 38]
    assert patch_position_ids(1, 1, 8).tolist() == [0]
