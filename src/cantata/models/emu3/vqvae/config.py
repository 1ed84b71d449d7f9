"""Shape of Emu3's tokenizer; the class is the schema of a YAML section."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError
from cantata.nn.resnet import MAX_GROUPS, PyramidShape


@dataclass(frozen=True)
class Emu3VQVAEConfig:
    """Encoder and decoder of frames, and what halves and doubles the number of frames between them."""

    base_channels: int
    """Of the finest level."""
    channel_multipliers: tuple[int, ...]
    """Of each level, finest first; the levels but the last halve rows and columns."""
    num_res_blocks: int
    """Residual blocks of each level of the encoder, and over frames; the decoder's levels have one more."""
    attention_levels: tuple[int, ...]
    """Levels, 0 the finest, whose residual blocks are each followed by attention."""
    z_channels: int
    """Values of a latent; the quantiser's width is the same."""
    temporal_factor: int
    """Frames that a frame of codes stands for: a power of two."""

    def __post_init__(self) -> None:
        if not self.channel_multipliers or self.num_res_blocks < 1 or self.z_channels < 1:
            raise ConfigError(
                "model.shape: channel_multipliers needs at least one level, num_res_blocks and z_channels at "
                "least 1"
            )
        widths = [self.base_channels * multiplier for multiplier in self.channel_multipliers]
        if any(width < 1 or width % MAX_GROUPS for width in (self.base_channels, *widths)):
            raise ConfigError(
                f"model.shape.base_channels={self.base_channels} and channel_multipliers="
                f"{list(self.channel_multipliers)} give levels of {widths} channels; each must be a multiple "
                f"of {MAX_GROUPS}, the groups of a norm"
            )
        if not set(self.attention_levels) <= set(range(len(widths))):
            raise ConfigError(
                f"model.shape.attention_levels is {list(self.attention_levels)}; channel_multipliers give "
                f"the levels 0 to {len(widths) - 1}"
            )
        if self.temporal_factor < 1 or self.temporal_factor & (self.temporal_factor - 1):
            raise ConfigError(
                f"model.shape.temporal_factor is {self.temporal_factor}; it must be a power of two"
            )

    @property
    def factor(self) -> int:
        """Rows, and columns, of pixels that become one of codes."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def halvings(self) -> int:
        """How often the number of frames is halved."""
        return self.temporal_factor.bit_length() - 1

    @property
    def encoder(self) -> PyramidShape:
        return self._pyramid(self.num_res_blocks)

    @property
    def decoder(self) -> PyramidShape:
        return self._pyramid(self.num_res_blocks + 1)

    def _pyramid(self, num_blocks: int) -> PyramidShape:
        return PyramidShape(self.base_channels, self.channel_multipliers, num_blocks, self.attention_levels)
