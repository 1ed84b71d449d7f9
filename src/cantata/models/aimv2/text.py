"""The text tower of AIMv2's contrastive model.

T  tokens of all texts    S  texts    D  hidden size
"""

from __future__ import annotations

from torch import Tensor, nn

from cantata.core.types import Segments
from cantata.models.aimv2.block import Block
from cantata.models.aimv2.config import Aimv2TextConfig
from cantata.nn.attention import PackedAttention
from cantata.nn.norm import RMSNorm


class TextEmbedding(nn.Module):
    """Tokens plus their learned positions."""

    def __init__(self, config: Aimv2TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor) -> Tensor:
        x_TD: Tensor = self.token_embedding(input_ids_T) + self.position_embedding(position_ids_T)
        return x_TD


class TextTower(nn.Module):
    """Texts to one feature each: causal blocks, the final norm, and what stands at a text's last token.

    A text ends with its first end token, so a packed one has no other.
    """

    def __init__(self, config: Aimv2TextConfig) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
        self.embeddings = TextEmbedding(config)
        self.layers = nn.ModuleList(
            Block(*sizes, config.rms_norm_eps) for _ in range(config.num_hidden_layers)
        )
        self.rms_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids_T: Tensor, position_ids_T: Tensor, texts: Segments) -> Tensor:
        """Features of the texts, (S, D); tokens beyond the texts' total count for nothing."""
        attend = PackedAttention(texts, causal=True)
        x_TD: Tensor = self.embeddings(input_ids_T, position_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, attend)
        last_S = texts.offsets(x_TD.device)[1:] - 1
        features_SD: Tensor = self.rms_norm(x_TD.index_select(0, last_S))
        return features_SD
