"""Mllama's decoder: Llama's blocks, and gated blocks between them that attend to images.

R  tokens that read images    F  features of all images
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cantata.models.mllama.config import EXTRA_EMBEDDINGS, MllamaTextConfig
from cantata.nn.cross_attention import CrossAttention, Reading
from cantata.nn.decoder_block import DecoderBlock
from cantata.nn.mlp import SwiGLU
from cantata.nn.norm import RMSNorm
from cantata.nn.rows import take_rows


class CrossBlock(nn.Module):
    """Llama's block for the tokens that read images, whose features stand in for the text's keys and values.

    What it adds is scaled by the tanh of two learned numbers. A token that reads no image passes unchanged.
    """

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config.hidden_size, *heads, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.full((1,), config.initial_gate))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.cross_attn_mlp_gate = nn.Parameter(torch.full((1,), config.initial_gate))

    def forward(self, x_TD: Tensor, features_FD: Tensor, reading: Reading) -> Tensor:
        x_RD = take_rows(x_TD, reading.tokens_R)
        y_RD: Tensor = self.cross_attn(self.input_layernorm(x_RD), features_FD, reading)
        x_RD = x_RD + self.cross_attn_attn_gate.tanh() * y_RD
        readers, others = x_RD[: reading.num_readers], x_RD[reading.num_readers :]
        y_RD = self.mlp(self.post_attention_layernorm(readers))
        readers = readers + self.cross_attn_mlp_gate.tanh() * y_RD
        x_RD = torch.cat((readers, others)) if len(others) else readers
        return x_TD.index_copy(0, reading.tokens_R, x_RD)


class Decoder(nn.Module):
    """Holds the decoder's parts; `Mllama.forward` runs them one by one."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size)
        sizes = (config.hidden_size, config.intermediate_size)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.layers = nn.ModuleList(
            CrossBlock(config)
            if index in config.cross_attention_layers
            else DecoderBlock(*sizes, *heads, config.rms_norm_eps)
            for index in range(config.num_hidden_layers)
        )
