"""Shapes that cannot be built are refused with the key and what it must be."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cantata.core.errors import ConfigError
from tests.models.aria.small import small_layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_key_value_heads": 3},
            "text.num_key_value_heads is 3; it must divide num_attention_heads (4)",
        ),
        ({"num_key_value_heads": 0}, "model.text.num_key_value_heads is 0"),
        ({"head_dim": 7}, "model.text.head_dim is 7"),
        ({"moe": {"top_k": 5}}, "model.text.moe.top_k is 5; it must lie between 1 and the 4 experts in"),
    ],
)
def test_text(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        small_layout(**change)


def test_vision_and_projector() -> None:
    layout = small_layout()
    with pytest.raises(ConfigError, match=r"model\.vision\.patch_size is 3; it must divide"):
        replace(layout.vision, patch_size=3)
    with pytest.raises(ConfigError, match="patch_to_query is empty"):
        replace(layout.projector, patch_to_query={})
