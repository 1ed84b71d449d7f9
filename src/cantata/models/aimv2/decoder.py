"""The causal decoder over patches and text that pretrains AIMv2's encoder, and its head for pixels."""

from __future__ import annotations

from torch import Tensor, nn

from cantata.models.aimv2.config import Aimv2DecoderConfig
from cantata.nn.decoder_block import DecoderBlock
from cantata.nn.matmul import Linear
from cantata.nn.norm import RMSNorm


class Decoder(nn.Module):
    """Holds the decoder's parts; `Aimv2Pretraining.forward` runs them one by one."""

    def __init__(self, config: Aimv2DecoderConfig, vision_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.connector = Linear(vision_size, config.hidden_size, bias=False)
        sizes = (config.hidden_size, config.intermediate_size)
        heads = (config.num_attention_heads, config.num_attention_heads, config.head_dim)
        self.layers = nn.ModuleList(
            DecoderBlock(*sizes, *heads, config.rms_norm_eps) for _ in range(config.num_hidden_layers)
        )


class PixelHead(nn.Module):
    """RMSNorm, then a patch's values."""

    def __init__(self, config: Aimv2DecoderConfig, patch_values: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = Linear(config.hidden_size, patch_values)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.output(self.norm(x_RD))
