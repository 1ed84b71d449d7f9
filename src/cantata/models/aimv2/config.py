"""Shapes and settings of AIMv2; each class is the schema of one YAML section."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError
from cantata.models.checks import check_divides


@dataclass(frozen=True)
class Aimv2VisionConfig:
    """The image encoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    """Pixels of a side: of every image with learned positions, of the longest side of a native one."""
    patch_size: int
    num_channels: int
    rms_norm_eps: float
    is_native: bool
    """Images of any size with computed positions, instead of squares of one size with learned ones."""
    use_head: bool
    """Whether a head pools an image's features into one, as the published LiT model has it."""
    initializer_range: float

    def __post_init__(self) -> None:
        check_divides(self, "vision", "num_attention_heads", "hidden_size")
        check_divides(self, "vision", "patch_size", "image_size")
        if self.is_native and self.hidden_size % 4:
            raise ConfigError(
                f"model.vision.hidden_size is {self.hidden_size}; computed positions need a multiple of 4"
            )

    @property
    def grid(self) -> int:
        """Patches along the largest side: position ids are `row * grid + column`."""
        return self.image_size // self.patch_size

    @property
    def patch_values(self) -> int:
        """Values of a flattened patch."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class Aimv2TextConfig:
    """The text tower of the contrastive model: the encoder's blocks over tokens, causal."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    """Longest text, its first and last token included."""
    eos_token_id: int
    """Ends every text; the feature of the first one is the text's."""
    rms_norm_eps: float
    initializer_range: float

    def __post_init__(self) -> None:
        check_divides(self, "text", "num_attention_heads", "hidden_size")


@dataclass(frozen=True)
class Aimv2DecoderConfig:
    """The decoder that pretraining needs and nobody keeps: causal, over patches and text alike.

    The paper gives its width and depth; positions are rotary here, which it does not say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    """Longest sequence that generation goes on with; training does not read it."""
    initializer_range: float

    def __post_init__(self) -> None:
        check_divides(self, "decoder", "num_attention_heads", "hidden_size")
        if self.head_dim % 2:
            raise ConfigError(
                f"model.decoder: hidden_size / num_attention_heads is {self.head_dim}; rotary positions need "
                "an even number"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
