"""Shape of the convolutional autoencoder; the class is the schema of a YAML section."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError
from cantata.nn.resnet import PyramidShape


@dataclass(frozen=True)
class AutoencoderConfig:
    """Encoder and decoder: mirror images, of which either may be the wider one."""

    encoder_channels: int
    """Of the encoder's finest level."""
    decoder_channels: int
    """Of the decoder's finest level."""
    channel_multipliers: tuple[int, ...]
    """Of each level, finest first; the levels but the last halve rows and columns: 4 give f8, 5 give f16."""
    patch_size: int
    """Side of the squares of pixels that are one position of the finest level, each pixel a channel: 1 is as
    published; 2 saves the level that costs the most time and memory, and counts like one more level."""
    num_res_blocks: int
    """Residual blocks of each of the encoder's levels."""
    decoder_res_blocks: int
    """Of each of the decoder's; as published one more."""
    middle: bool
    """A residual block, attention and a residual block more at the coarsest level of both, as published."""
    direct_resampling: bool
    """The convolutions between two levels lead to the other's channels, so that a position keeps more of the
    four it stands for. As published false: they keep their level's channels, and the next block changes them.
    """
    attention_levels: tuple[int, ...]
    """Levels, 0 the finest, whose residual blocks are each followed by attention."""
    z_channels: int
    """Values of a latent before it is mapped to the quantiser's width."""

    def __post_init__(self) -> None:
        positive = {
            "encoder_channels": self.encoder_channels,
            "decoder_channels": self.decoder_channels,
            "num_res_blocks": self.num_res_blocks,
            "decoder_res_blocks": self.decoder_res_blocks,
            "z_channels": self.z_channels,
            "patch_size": self.patch_size,
            "channel_multipliers": min(self.channel_multipliers, default=0),
        }
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"model.shape.{name} must be at least 1, and a list not empty")
        levels = range(len(self.channel_multipliers))
        if not set(self.attention_levels) <= set(levels):
            raise ConfigError(
                f"model.shape.attention_levels is {list(self.attention_levels)}; channel_multipliers give "
                f"the levels 0 to {levels[-1]}"
            )

    @property
    def factor(self) -> int:
        """Rows, and columns, of pixels that become one of codes."""
        return self.patch_size << (len(self.channel_multipliers) - 1)

    @property
    def encoder(self) -> PyramidShape:
        return self._pyramid(self.encoder_channels, self.num_res_blocks)

    @property
    def decoder(self) -> PyramidShape:
        return self._pyramid(self.decoder_channels, self.decoder_res_blocks)

    def _pyramid(self, channels: int, num_blocks: int) -> PyramidShape:
        return PyramidShape(
            channels,
            self.channel_multipliers,
            num_blocks,
            self.attention_levels,
            self.middle,
            self.direct_resampling,
        )
