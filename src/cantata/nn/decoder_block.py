"""Llama's block, of which decoders are made (Touvron et al., 2023, arXiv:2302.13971)."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.nn.attention import Attend
from cantata.nn.mlp import SwiGLU
from cantata.nn.norm import RMSNorm
from cantata.nn.rope import RotaryTables
from cantata.nn.self_attention import SelfAttention


class DecoderBlock(nn.Module):
    """Attention with rotary positions, then a gated MLP, each behind an RMSNorm and with a residual.

    hidden_size, intermediate_size: width of the tokens, and inside the MLP.
    num_heads, num_kv_heads, head_dim: as of `SelfAttention`.
    eps: of the norms.
    dropout: share of what attention and MLP add that is zeroed in training.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = SelfAttention(hidden_size, num_heads, num_kv_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: Tensor, tables: RotaryTables, attend: Attend) -> Tensor:
        y_TD: Tensor = self.dropout(self.self_attn(self.input_layernorm(x_TD), tables, attend))
        x_TD = x_TD + y_TD
        y_TD = self.dropout(self.mlp(self.post_attention_layernorm(x_TD)))
        return x_TD + y_TD
