"""Shapes and ids that cannot be are refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from tests.models.emu3.small import TOKENS, small_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_shapes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 0}, "codebook_size=0 must be at least 1"),
        ({"eol": -1}, "tokens.eol=-1 must be at least 0"),
        ({"visual_offset": -1}, "visual_offset=-1 must be at least 0"),
        ({"eof": 6148}, "tokens.eof and tokens.eol are both 6148"),
        ({"eoi": 6161}, "tokens.eoi=6161 lies among the codes' ids, 6160 to 6175"),
    ],
)
def test_ids(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TOKENS, **changes)


def test_where_the_ids_end() -> None:
    assert (TOKENS.size, TOKENS.end_of_visual) == (6176, 6176)
    assert replace(TOKENS, bos=9000).size == 9001
    assert [TOKENS.is_visual(token) for token in (6159, 6160, 6175, 6176)] == [False, True, True, False]
