"""Emu3: one decoder for text and images, which are tokens alike (Wang et al., 2024, arXiv:2409.18869)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.core.types import Batch, ModelOutput
from cantata.models.emu3.config import Emu3TextConfig
from cantata.models.emu3.hf import Emu3Layout, read_hub_config
from cantata.models.emu3.processor import Emu3Processor
from cantata.models.lora import base_names
from cantata.models.protocol import DecodingStep, Unit
from cantata.nn.attention import PackedAttention
from cantata.nn.decoder_block import DecoderBlock
from cantata.nn.head import LanguageHead
from cantata.nn.moe.layer import MoELayer
from cantata.nn.rope import rotary_tables


class Decoder(nn.Module):
    """Holds the decoder's parts; `Emu3.forward` runs them one by one."""

    def __init__(self, config: Emu3TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        sizes = (config.hidden_size, config.intermediate_size)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.layers = nn.ModuleList(
            DecoderBlock(*sizes, *heads, config.rms_norm_eps, config.dropout)
            for _ in range(config.num_hidden_layers)
        )


class Emu3(nn.Module):
    """The language model, from packed tokens to the loss. The image tokenizer is a model of its own.

    text: shapes and settings.
    weights: Hugging Face directory to start from, or null for random weights; the recipe reads it.
    """

    balance = None
    """It has no experts."""

    def __init__(self, text: Emu3TextConfig, weights: str | None = None) -> None:
        super().__init__()
        self.text_config = text
        self.weights = weights
        self.text = Decoder(text)
        self.head = LanguageHead(
            text.hidden_size, text.vocab_size, text.rms_norm_eps, tied=text.tie_word_embeddings
        )

    def forward(
        self, batch: Batch, *, with_logits: bool = False, step: DecodingStep | None = None
    ) -> ModelOutput:
        """The loss of a packed micro-batch, and its logits (T, V) if asked.

        With a step of a generation: only the logits after each sample, (S, V); see `protocol.Decodes`.
        """
        x_TD = self._decode(self.text.embed_tokens(batch.input_ids_T), batch, step)
        if step is not None:
            with_logits = True
            x_TD = x_TD.index_select(0, batch.samples.offsets(x_TD.device)[1:] - 1)
        tied_weight_VD = self.text.embed_tokens.weight if self.text_config.tie_word_embeddings else None
        loss_sum, loss_N, logits_TV = self.head(
            x_TD, batch.labels_T, batch.target_index_N, batch.target_weight_N, tied_weight_VD, with_logits
        )
        return ModelOutput(loss_sum, loss_N, None, logits_TV)

    def _decode(self, x_TD: Tensor, batch: Batch, step: DecodingStep | None) -> Tensor:
        text = self.text_config
        tables = rotary_tables(batch.position_ids_T, text.head_dim, text.rope_theta, x_TD.dtype)
        dropout = text.dropout if self.training else 0.0
        packed = PackedAttention(batch.samples, causal=True, dropout=dropout)
        for index, layer in enumerate(self.text.layers):
            x_TD = layer(x_TD, tables, packed if step is None else step.attention(index))
        return x_TD

    def units(self) -> Sequence[Unit]:
        """What to shard, in forward's order. A tied embedding, needed at both ends, belongs to the root."""
        tied = self.text_config.tie_word_embeddings
        return [
            *([] if tied else [Unit("text.embed_tokens", self.text.embed_tokens, False)]),
            *(Unit(f"text.layers.{i}", layer, True) for i, layer in enumerate(self.text.layers)),
            Unit("head", self.head, False),
        ]

    def moe_layers(self) -> Sequence[MoELayer]:
        """None."""
        return ()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill with the initial value: norms 1, the rest normal with `initializer_range`."""
        with torch.no_grad():
            if "norm" in name.split(".")[-2]:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, self.text_config.initializer_range, generator=generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """6 per weight (2 forward, 4 backward), plus causal attention over half a sample.

        Under adapters 4 per weight, which gets no gradient of its own; the adapters are left out.
        """
        text = self.text_config
        heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        layer = text.hidden_size * (2 * heads + 2 * kv + 3 * text.intermediate_size)
        weights = text.num_hidden_layers * layer + text.hidden_size * text.vocab_size
        per_weight = 4.0 if base_names(self) else 6.0
        return per_weight * weights + 6.0 * text.num_hidden_layers * heads * mean_sample_length

    @property
    def max_positions(self) -> int:
        return self.text_config.max_position_embeddings

    @property
    def token_embedding(self) -> nn.Module:
        return self.text.embed_tokens

    def check_processor(self, processor: Processor) -> None:
        """Raise `ConfigError` where `collator.processor` makes what this model cannot read."""
        vocab_size = self.text_config.vocab_size
        if processor.patch_values:
            raise ConfigError(
                f"collator.processor is {type(processor).__name__}, which cuts images into patches; Emu3 "
                "reads them as codes: set collator=emu3 or collator=emu3_mini"
            )
        if isinstance(processor, Emu3Processor) and processor.tokens.size > vocab_size:
            tokens = processor.tokens
            raise ConfigError(
                f"collator.processor.tokens: visual_offset={tokens.visual_offset} and "
                f"codebook_size={tokens.codebook_size} with the other ids reach up to {tokens.size - 1}; "
                f"model.text.vocab_size={vocab_size} ends at {vocab_size - 1}"
            )
        if processor.vocab_size > vocab_size:
            raise ConfigError(
                f"collator.processor.tokenizer has {processor.vocab_size} tokens, more than "
                f"model.text.vocab_size={vocab_size}"
            )

    def hub_layout(self) -> Emu3Layout:
        return Emu3Layout(self.text_config)


def emu3_from_hub(directory: str | Path) -> Emu3:
    """Build the language model that a Hugging Face directory describes; its weights are not read."""
    return Emu3(read_hub_config(directory).text, weights=str(directory))
