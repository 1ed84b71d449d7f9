"""The autoencoder's shape: what follows from it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cantata.core.errors import ConfigError
from tests.models.autoencoder.small import COMPACT, SHAPE


def test_a_code_stands_for_what_levels_and_patches_halve() -> None:
    assert SHAPE.factor == 4
    assert replace(SHAPE, patch_size=2).factor == 8
    assert replace(SHAPE, channel_multipliers=(1,), attention_levels=()).factor == 1


def test_encoder_and_decoder_are_mirror_images_of_other_widths_and_depths() -> None:
    encoder, decoder = SHAPE.encoder, SHAPE.decoder
    assert (encoder.channels, encoder.num_blocks) == (8, 1)
    assert (decoder.channels, decoder.num_blocks) == (12, 2)
    assert encoder._replace(channels=12, num_blocks=2) == decoder
    assert (COMPACT.encoder.middle, COMPACT.encoder.direct) == (False, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_multipliers": ()}, r"model\.shape\.channel_multipliers must be at least 1"),
        ({"channel_multipliers": (1, 0)}, r"model\.shape\.channel_multipliers must be at least 1"),
        ({"encoder_channels": 0}, r"model\.shape\.encoder_channels must be"),
        ({"decoder_res_blocks": 0}, r"model\.shape\.decoder_res_blocks must be"),
        ({"z_channels": 0}, r"model\.shape\.z_channels must be"),
        ({"patch_size": 0}, r"model\.shape\.patch_size must be"),
        (
            {"attention_levels": (3,)},
            r"attention_levels is \[3\]; channel_multipliers give the levels 0 to 2",
        ),
        ({"attention_levels": (-1,)}, r"attention_levels is \[-1\]"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SHAPE, **change)  # type: ignore[arg-type]
