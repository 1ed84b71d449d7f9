"""The causal decoder over patches and text that pretrains AIMv2's encoder, and its head for pixels."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.models.aimv2.config import Aimv2DecoderConfig
from cantata.nn.attention import Attend
from cantata.nn.matmul import Linear
from cantata.nn.mlp import SwiGLU
from cantata.nn.norm import RMSNorm
from cantata.nn.rope import RotaryTables
from cantata.nn.self_attention import SelfAttention


class DecoderBlock(nn.Module):
    """Attention with rotary positions, then a gated MLP, each behind an RMSNorm and with a residual."""

    def __init__(self, config: Aimv2DecoderConfig) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.self_attn = SelfAttention(size, heads, heads, config.head_dim)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.mlp = SwiGLU(size, config.intermediate_size)

    def forward(self, x_TD: Tensor, tables: RotaryTables, attend: Attend) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), tables, attend)
        y_TD: Tensor = self.mlp(self.post_attention_layernorm(x_TD))
        return x_TD + y_TD


class Decoder(nn.Module):
    """Holds the decoder's parts; `Aimv2Pretraining.forward` runs them one by one."""

    def __init__(self, config: Aimv2DecoderConfig, vision_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.connector = Linear(vision_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))


class PixelHead(nn.Module):
    """RMSNorm, then a patch's values."""

    def __init__(self, config: Aimv2DecoderConfig, patch_values: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = Linear(config.hidden_size, patch_values)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.output(self.norm(x_RD))
