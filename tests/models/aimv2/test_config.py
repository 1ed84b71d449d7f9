"""What AIMv2's sections say of themselves, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from tests.models.aimv2.small import DECODER, NATIVE, TEXT, VISION


def test_what_follows_from_the_sizes() -> None:
    assert (VISION.grid, VISION.patch_values) == (4, 3 * 4 * 4)
    assert NATIVE.grid == 10
    assert DECODER.head_dim == 8


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (VISION, {"num_attention_heads": 5}, r"model\.vision\.num_attention_heads is 5; it must divide"),
        (VISION, {"patch_size": 3}, r"model\.vision\.patch_size is 3; it must divide image_size \(16\)"),
        (VISION, {"patch_size": 0}, r"model\.vision\.patch_size is 0"),
        (TEXT, {"num_attention_heads": 5}, r"model\.text\.num_attention_heads is 5"),
        (DECODER, {"num_attention_heads": 5}, r"model\.decoder\.num_attention_heads is 5"),
        (DECODER, {"num_attention_heads": 8}, r"model\.decoder: .* is 3; rotary positions need an even"),
    ],
)
def test_sizes_that_cannot_be(section: Any, change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(section, **change)


def test_computed_positions_need_four_equal_parts() -> None:
    sizes = {"hidden_size": 30, "num_attention_heads": 3}
    replace(VISION, **sizes)
    with pytest.raises(ConfigError, match=r"hidden_size is 30; computed positions need a multiple of 4"):
        replace(NATIVE, **sizes)
