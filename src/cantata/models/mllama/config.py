"""Shapes and settings of Mllama; each class is the schema of one YAML section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cantata.core.errors import ConfigError
from cantata.models.checks import check_divides
from cantata.nn.rope import Llama3Scaling

PADDING_MULTIPLE = 8
"""The tower fills up each tile's positions to a multiple of this; no square of patches needs no filling."""
EXTRA_EMBEDDINGS = 8
"""Rows of the embedding beyond the vocabulary: the image token's, and a few that nothing uses."""


class Masking(Enum):
    """What the tokens before a document's first image get of its images."""

    meta = "meta"
    """Nothing, as in the authors' code: what comes before an image does not depend on it."""
    transformers = "transformers"
    """The mean over all images of the document that attention without a mask gives, padded tiles included, as
    transformers computes it (huggingface/transformers#39379). For parity alone."""


@dataclass(frozen=True)
class MllamaVisionConfig:
    """The vision tower: a ViT over an image's tiles, whose last layers see all tiles at once."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    """Gated layers after the others."""
    num_attention_heads: int
    image_size: int
    """Pixels along a tile."""
    patch_size: int
    num_channels: int
    max_num_tiles: int
    """Most tiles that an image is cut into; the tower pads every image to so many."""
    intermediate_layers: Sequence[int]
    """Layers, counted from 0, whose outputs are features beside the last one's."""
    image_mean: Sequence[float]
    """Of each channel, subtracted from pixels between 0 and 1."""
    image_std: Sequence[float]
    """What they are divided by then."""
    layer_norm_eps: float
    """Of the layers' norms; the norms before and after them have torch's."""
    initializer_range: float

    def __post_init__(self) -> None:
        check_divides(self, "vision", "num_attention_heads", "hidden_size")
        check_divides(self, "vision", "patch_size", "image_size")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != self.num_channels or (name == "image_std" and not all(v > 0 for v in values)):
                raise ConfigError(
                    f"model.vision.{name} is {list(values)}; it must hold a number for each of the "
                    f"{self.num_channels} channels, of the deviation above 0"
                )
        if self.max_num_tiles < 1:
            raise ConfigError(f"model.vision.max_num_tiles is {self.max_num_tiles}; it must be at least 1")
        layers = list(self.intermediate_layers)
        if not layers or not all(0 <= layer < self.num_hidden_layers for layer in layers):
            raise ConfigError(
                f"model.vision.intermediate_layers {layers}: at least one, each below num_hidden_layers "
                f"({self.num_hidden_layers})"
            )

    @property
    def patches(self) -> int:
        """Of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def positions(self) -> int:
        """Of a tile: its patches, behind one that sums it up. Also the features of a tile."""
        return self.patches + 1

    @property
    def padded_positions(self) -> int:
        """Of a tile, with those that fill it up."""
        return -(-self.positions // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @property
    def patch_values(self) -> int:
        """Values of a flattened patch."""
        return self.num_channels * self.patch_size**2

    @property
    def feature_size(self) -> int:
        """Width of what the projector reads."""
        return self.hidden_size * (1 + len(self.intermediate_layers))


@dataclass(frozen=True)
class MllamaTextConfig:
    """The decoder: Llama's blocks, some of which attend to images instead of the text."""

    vocab_size: int
    """Tokens that the model can write; the image token is one that it cannot, or one of them."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Of both kinds."""
    cross_attention_layers: Sequence[int]
    """Those that attend to images, counted from 0."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    """How Llama 3.1 makes its context longer; null leaves the frequencies as they are."""
    rms_norm_eps: float
    max_position_embeddings: int
    """Longest context that an exported checkpoint claims; training does not read it."""
    initializer_range: float
    initial_gate: float
    """Of the blocks that read images, before tanh: 0 where they join a trained language model, which begins
    as it was then. A model that learns all at once is slow to look at images from there (`mllama_mini`)."""
    bos_token_id: int
    """This and the next two go into an exported `config.json`; training does not read them."""
    eos_token_id: int
    pad_token_id: int

    def __post_init__(self) -> None:
        check_divides(self, "text", "num_key_value_heads", "num_attention_heads")
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ConfigError(
                f"model.text: num_attention_heads ({self.num_attention_heads}) of head_dim ({self.head_dim}) "
                f"must make hidden_size ({self.hidden_size})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.text.head_dim is {self.head_dim}; rotary positions need an even number")
        layers = list(self.cross_attention_layers)
        if layers != sorted(set(layers)) or not all(0 <= i < self.num_hidden_layers for i in layers):
            raise ConfigError(
                f"model.text.cross_attention_layers {layers}: each must be below num_hidden_layers "
                f"({self.num_hidden_layers}), in order and once"
            )
