"""The shape of Emu3's tokenizer: what follows from it, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from tests.models.emu3.vqvae.small import small_shape


def test_what_a_code_stands_for() -> None:
    shape = small_shape()
    assert (shape.factor, shape.temporal_factor, shape.halvings) == (2, 4, 2)
    still = small_shape(temporal_factor=1, channel_multipliers=(1,), attention_levels=())
    assert (still.factor, still.halvings) == (1, 0)


def test_the_decoders_levels_have_one_block_more() -> None:
    shape = small_shape()
    assert shape.decoder == shape.encoder._replace(num_blocks=shape.encoder.num_blocks + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_channels": 48}, "levels of [48, 96] channels; each must be a multiple of 32"),
        ({"base_channels": 0}, "levels of [0, 0] channels"),
        ({"channel_multipliers": (1, 0)}, "levels of [32, 0] channels"),
        ({"temporal_factor": 3}, "temporal_factor is 3; it must be a power of two"),
        ({"temporal_factor": 0}, "temporal_factor is 0"),
        ({"attention_levels": (2,)}, "the levels 0 to 1"),
        ({"channel_multipliers": ()}, "at least one level"),
        ({"num_res_blocks": 0}, "num_res_blocks and z_channels at least 1"),
        ({"z_channels": 0}, "num_res_blocks and z_channels at least 1"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        small_shape(**change)
