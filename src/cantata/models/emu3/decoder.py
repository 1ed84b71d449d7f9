"""Emu3's decoder: Llama's blocks, with dropout before each residual."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.models.emu3.config import Emu3TextConfig
from cantata.nn.attention import Attend
from cantata.nn.mlp import SwiGLU
from cantata.nn.norm import RMSNorm
from cantata.nn.rope import RotaryTables
from cantata.nn.self_attention import SelfAttention


class DecoderBlock(nn.Module):
    """Attention, then a gated MLP, each behind an RMSNorm, dropped out in training, and with a residual."""

    def __init__(self, config: Emu3TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, tables: RotaryTables, attend: Attend) -> Tensor:
        y_TD: Tensor = self.dropout(self.self_attn(self.input_layernorm(x_TD), tables, attend))
        x_TD = x_TD + y_TD
        y_TD = self.dropout(self.mlp(self.post_attention_layernorm(x_TD)))
        return x_TD + y_TD
