"""Mllama: a language model whose cross-attention layers read images (Llama 3.2 Vision; arXiv:2407.21783).

T  tokens    F  features of all images
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError, RunError
from cantata.core.samples import Processor
from cantata.core.types import Batch, ModelOutput, Segments
from cantata.models.lora import base_names
from cantata.models.mllama.config import EXTRA_EMBEDDINGS, Masking, MllamaTextConfig, MllamaVisionConfig
from cantata.models.mllama.decoder import CrossBlock, Decoder
from cantata.models.mllama.hf import MllamaLayout, read_hub_config
from cantata.models.mllama.processor import MllamaProcessor
from cantata.models.mllama.tiles import canvases
from cantata.models.mllama.vision import TowerOutput, VisionTower
from cantata.models.protocol import DecodingStep, Unit
from cantata.nn.attention import PackedAttention
from cantata.nn.cross_attention import ImageReading, Reading
from cantata.nn.head import LanguageHead
from cantata.nn.matmul import Linear
from cantata.nn.moe.layer import MoELayer
from cantata.nn.rope import rotary_tables


class Mllama(nn.Module):
    """The whole model, from packed tokens and patches to the loss.

    vision: shapes and settings of the tower; null leaves tower and projector out, for text alone. The
        cross-attention layers, which text does not run through, are kept then and frozen.
    text: shapes and settings of the decoder.
    image_token_id: the placeholder of an image, one token.
    masking: what tokens before an image get of it; `meta` unless results must be those of transformers.
    weights: Hugging Face directory to start from, or null for random weights; the recipe reads it.
    """

    balance = None
    """It has no experts."""

    def __init__(
        self,
        vision: MllamaVisionConfig | None,
        text: MllamaTextConfig,
        image_token_id: int,
        masking: Masking = Masking.meta,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.vision_config, self.text_config = vision, text
        self.image_token_id = image_token_id
        self.masking = Masking(masking)
        self.weights = weights
        if not 0 <= image_token_id < text.vocab_size + EXTRA_EMBEDDINGS:
            raise ConfigError(
                f"model.image_token_id={image_token_id}: the embedding has rows for ids up to "
                f"{text.vocab_size + EXTRA_EMBEDDINGS - 1}"
            )
        self.vision: VisionTower | None = None
        self.projector: Linear | None = None
        if vision is not None:
            self.vision = VisionTower(vision, len(canvases(vision.max_num_tiles)))
            self.projector = Linear(vision.feature_size, text.hidden_size)
        self.text = Decoder(text)
        self.head = LanguageHead(text.hidden_size, text.vocab_size, text.rms_norm_eps, tied=False)
        if vision is None:
            for layer in self.text.layers:
                layer.requires_grad_(not isinstance(layer, CrossBlock))

    def forward(
        self, batch: Batch, *, with_logits: bool = False, step: DecodingStep | None = None
    ) -> ModelOutput:
        """The loss of a packed micro-batch, and its logits (T, V) if asked.

        With a step of a generation: only the logits after each sample, (S, V); see `protocol.Decodes`.

        Raises `RunError` for images where there is no tower.
        """
        x_TD = self.text.embed_tokens(batch.input_ids_T)
        features_FD, reading = self._images(batch, x_TD, step)
        x_TD = self._decode(x_TD, batch, features_FD, reading, step)
        if step is not None:
            with_logits = True
            x_TD = x_TD.index_select(0, batch.samples.offsets(x_TD.device)[1:] - 1)
        loss_sum, loss_N, logits_TV = self.head(
            x_TD, batch.labels_T, batch.target_index_N, batch.target_weight_N, None, with_logits
        )
        return ModelOutput(loss_sum, loss_N, None, logits_TV)

    def _images(
        self, batch: Batch, x_TD: Tensor, step: DecodingStep | None
    ) -> tuple[Tensor, ImageReading | None]:
        """The features of all images, and who reads them; none of either while new tokens are added."""
        none_FD = x_TD.new_empty((0, x_TD.shape[-1]))
        if step is not None and not step.is_prefill:
            return none_FD, None
        images = batch.images
        if self.vision is None or self.projector is None:
            if images.patches.lengths:
                raise RunError(
                    f"{len(images.patches.lengths)} images, and the model has no vision tower "
                    f"(model.vision=null): {batch.describe()}"
                )
            return none_FD, ImageReading(
                batch.samples, (), Segments(()), (), before=False, device=x_TD.device
            )
        before = self.masking is Masking.transformers
        found: TowerOutput = self.vision(images, padded_tiles=before)
        features_FD = self.projector(found.features_FC).to(x_TD.dtype)
        first_tokens, device = images.first_tokens, x_TD.device
        return features_FD, ImageReading(
            batch.samples, first_tokens, found.features, found.readable, before=before, device=device
        )

    def _decode(
        self,
        x_TD: Tensor,
        batch: Batch,
        features_FD: Tensor,
        reading: ImageReading | None,
        step: DecodingStep | None,
    ) -> Tensor:
        text = self.text_config
        tables = rotary_tables(
            batch.position_ids_T, text.head_dim, text.rope_theta, x_TD.dtype, text.rope_scaling
        )
        packed = PackedAttention(batch.samples, causal=True)
        for index, layer in enumerate(self.text.layers):
            if not isinstance(layer, CrossBlock):
                x_TD = layer(x_TD, tables, packed if step is None else step.attention(index))
                continue
            reads: Reading | None = reading if step is None else step.reading(index, reading)
            assert reads is not None
            x_TD = layer(x_TD, features_FD, reads)
        return x_TD

    def units(self) -> Sequence[Unit]:
        """What to shard, in forward's order."""
        tower: list[Unit] = []
        if self.vision is not None and self.projector is not None:
            tower = [
                Unit("vision.embeddings", self.vision.embeddings, False),
                *(Unit(f"vision.layers.{i}", layer, True) for i, layer in enumerate(self.vision.layers)),
                Unit("vision.between", self.vision.between, False),
                *(
                    Unit(f"vision.global_layers.{i}", layer, True)
                    for i, layer in enumerate(self.vision.global_layers)
                ),
                Unit("projector", self.projector, False),
            ]
        return [
            Unit("text.embed_tokens", self.text.embed_tokens, False),
            *tower,
            *(Unit(f"text.layers.{i}", layer, True) for i, layer in enumerate(self.text.layers)),
            Unit("head", self.head, False),
        ]

    def moe_layers(self) -> Sequence[MoELayer]:
        """None."""
        return ()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill with the initial value: norms 1, biases 0, the rest normal with the section's range.

        Gates of the text are `initial_gate`, those of the tower's last layers pi / 4, its others 0.
        """
        std = self.text_config.initializer_range
        if self.vision_config is not None and name.startswith(("vision.", "projector.")):
            std = self.vision_config.initializer_range
        leaf = name.rpartition(".")[2]
        with torch.no_grad():
            if leaf in ("gate_attn", "gate_ffn"):
                tensor.fill_(math.pi / 4)
            elif leaf in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                tensor.fill_(self.text_config.initial_gate)
            elif leaf.endswith(("bias", "gate")):
                tensor.zero_()
            elif "norm" in name.split(".")[-2]:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, std, generator=generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """6 per weight (2 forward, 4 backward), plus causal attention over half a sample.

        As of a token that reads an image: text alone is spared the cross-attention layers. Attention to
        images, and what is computed of their features, are left out. Under adapters 4 per weight, which gets
        no gradient of its own; the adapters are left out.
        """
        text = self.text_config
        heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        mlp, cross = 3 * text.intermediate_size, len(text.cross_attention_layers)
        own = text.num_hidden_layers - cross
        weights = text.hidden_size * (own * (2 * heads + 2 * kv + mlp) + text.vocab_size)
        if self.vision_config is not None:
            weights += text.hidden_size * cross * (2 * heads + mlp)
        per_weight = 4.0 if base_names(self) else 6.0
        return per_weight * weights + 6.0 * own * heads * mean_sample_length

    @property
    def max_positions(self) -> int:
        return self.text_config.max_position_embeddings

    @property
    def token_embedding(self) -> nn.Module:
        return self.text.embed_tokens

    @property
    def patches_per_image(self) -> int:
        vision = self.vision_config
        return 0 if vision is None else vision.max_num_tiles * vision.patches

    def check_processor(self, processor: Processor) -> None:
        """Raise `ConfigError` where `collator.processor` makes what this model cannot read."""
        wanted = {"image_token": (processor.image_token_id, self.image_token_id, "model.image_token_id")}
        vision = self.vision_config
        if vision is not None:
            wanted["patch_size"] = (processor.patch_values, vision.patch_values, "values of a patch")
        if vision is not None and isinstance(processor, MllamaProcessor):
            wanted["image_size"] = (processor.image_size, vision.image_size, "model.vision.image_size")
            tiles = (processor.max_num_tiles, vision.max_num_tiles, "model.vision.max_num_tiles")
            wanted["max_num_tiles"] = tiles
        for key, (found, needed, source) in wanted.items():
            if found != needed:
                raise ConfigError(
                    f"collator.processor.{key} gives {found}; the model needs {needed} ({source})"
                )
        vocab_size = self.text_config.vocab_size
        written = processor.vocab_size - (processor.image_token_id >= vocab_size)
        if written > vocab_size:
            raise ConfigError(
                f"collator.processor.tokenizer has {processor.vocab_size} tokens, more than "
                f"model.text.vocab_size={vocab_size} and the image token"
            )
        if not isinstance(processor, MllamaProcessor):
            raise ConfigError(
                f"collator.processor is {type(processor).__name__}, which makes no tiles; set "
                "collator=mllama or collator=mllama_mini"
            )

    def hub_layout(self) -> MllamaLayout:
        return MllamaLayout(self.vision_config, self.text_config, self.image_token_id)


def mllama_from_hub(directory: str | Path, masking: Masking = Masking.meta) -> Mllama:
    """Build the model that a Hugging Face directory describes; its weights are not read."""
    vision, text, image_token_id = read_hub_config(directory)
    return Mllama(vision, text, image_token_id, masking, weights=str(directory))
