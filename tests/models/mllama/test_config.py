"""Shapes that do not fit are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.models.mllama.config import PADDING_MULTIPLE
from tests.models.mllama.small import small_text, small_vision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads is 3; it must divide hidden_size"),
        ({"patch_size": 3}, "patch_size is 3; it must divide image_size"),
        ({"max_num_tiles": 0}, "max_num_tiles is 0"),
        ({"intermediate_layers": ()}, r"intermediate_layers \[\]: at least one"),
        ({"intermediate_layers": (3,)}, r"intermediate_layers \[3\].*num_hidden_layers \(3\)"),
        ({"image_mean": (0.5,)}, r"image_mean is \[0.5\]; it must hold a number for each of the 3 channels"),
        ({"image_std": (0.5, 0.0, 0.5)}, "image_std is .* of the deviation above 0"),
    ],
)
def test_of_the_tower(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_vision(**changes)


def test_every_tile_has_padding() -> None:
    """transformers' mask of padding hides all of a tile where there is none; no square has 8k - 1 patches."""
    assert all((side**2 + 1) % PADDING_MULTIPLE for side in range(1, 200))
    vision = small_vision(image_size=28)
    assert (vision.patches, vision.positions, vision.padded_positions) == (49, 50, 56)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads"),
        ({"head_dim": 16}, r"num_attention_heads \(4\) of head_dim \(16\) must make hidden_size \(32\)"),
        ({"hidden_size": 12, "head_dim": 3}, "head_dim is 3; rotary positions need an even number"),
        ({"cross_attention_layers": (3, 1)}, r"cross_attention_layers \[3, 1\]"),
        ({"cross_attention_layers": (1, 5)}, r"cross_attention_layers \[1, 5\].*num_hidden_layers \(5\)"),
    ],
)
def test_of_the_decoder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_text(**changes)
