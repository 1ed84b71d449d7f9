"""Shapes and settings of Aria; each class is the schema of one YAML section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import Images
from cantata.models.checks import check_divides
from cantata.models.protocol import HubPart
from cantata.nn.moe.balance import BalanceConfig


@dataclass(frozen=True)
class AriaVisionConfig:
    """The vision tower: SigLIP's shape with positions for images of any size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    """Pixels of the largest side; `image_size / patch_size` is the side of the grid of learned positions."""
    patch_size: int
    num_channels: int
    layer_norm_eps: float
    initializer_range: float

    def __post_init__(self) -> None:
        check_divides(self, "vision", "num_attention_heads", "hidden_size")
        check_divides(self, "vision", "patch_size", "image_size")

    @property
    def grid(self) -> int:
        """Side of the grid of learned positions."""
        return self.image_size // self.patch_size

    @property
    def true_positions(self) -> bool:
        """Positions are stretched: see `OtherTower`."""
        return False

    @property
    def patch_values(self) -> int:
        """Values of a flattened patch."""
        return self.num_channels * self.patch_size**2


class Tower(Protocol):
    """An image encoder: a module that gives a feature for each patch."""

    @property
    def embeddings(self) -> nn.Module: ...

    @property
    def layers(self) -> nn.ModuleList: ...

    def __call__(self, images: Images) -> Tensor: ...


@runtime_checkable
class OtherTower(Protocol):
    """Settings of another family's image encoder in the place of Aria's own tower."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_channels(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def patch_size(self) -> int: ...

    @property
    def initializer_range(self) -> float: ...

    @property
    def grid(self) -> int:
        """Side of the grid that position ids count in."""
        ...

    @property
    def patch_values(self) -> int:
        """Values of a flattened patch."""
        ...

    @property
    def true_positions(self) -> bool:
        """Whether it wants a patch's own row and column, where Aria stretches both over the whole grid."""
        ...

    def build(self) -> Tower:
        """The encoder."""
        ...

    def part(self, names: frozenset[str]) -> HubPart | None:
        """Where its initial values come from; None for random ones."""
        ...


@dataclass(frozen=True)
class AriaProjectorConfig:
    """The projector: learned queries that read an image's patches."""

    patch_to_query: Mapping[int, int]
    """Features made of an image, by the patches of its padded square: {1225: 128, 4900: 256} in Aria."""
    initializer_range: float

    def __post_init__(self) -> None:
        if not self.patch_to_query:
            raise ConfigError("model.projector.patch_to_query is empty; give at least one `patches: queries`")

    @property
    def num_queries(self) -> int:
        return max(self.patch_to_query.values())


@dataclass(frozen=True)
class AriaMoEConfig:
    """Every decoder layer's mixture of experts."""

    num_experts: int
    top_k: int
    num_shared_experts: int
    expert_intermediate_size: int
    num_groups: int
    """Equal groups of consecutive experts that a token chooses among first; 1 is without groups."""
    top_groups: int
    """Groups that a token may send itself to; as many as `num_groups` limits nothing."""
    balance: BalanceConfig

    def __post_init__(self) -> None:
        self.balance.check(self.num_experts)
        if not 1 <= self.top_groups <= self.num_groups or self.num_experts % self.num_groups:
            raise ConfigError(
                f"model.text.moe: num_groups ({self.num_groups}) must divide num_experts "
                f"({self.num_experts}), and top_groups ({self.top_groups}) lie between 1 and num_groups"
            )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        if not 1 <= self.top_k <= reachable:
            raise ConfigError(
                f"model.text.moe.top_k is {self.top_k}; it must lie between 1 and the {reachable} experts in "
                f"top_groups ({self.top_groups}) of num_groups ({self.num_groups})"
            )


@dataclass(frozen=True)
class AriaTextConfig:
    """The decoder: Llama's blocks with a mixture of experts in each."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    """Longest context that an exported checkpoint claims; training does not read it."""
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int
    """This and the next two go into an exported `config.json`; training does not read them."""
    eos_token_id: int
    pad_token_id: int
    moe: AriaMoEConfig

    def __post_init__(self) -> None:
        check_divides(self, "text", "num_key_value_heads", "num_attention_heads")
        if self.head_dim % 2:
            raise ConfigError(f"model.text.head_dim is {self.head_dim}; rotary positions need an even number")
