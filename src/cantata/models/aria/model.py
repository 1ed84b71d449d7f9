"""Aria: a mixture-of-experts language model that reads images (Li et al., 2024, arXiv:2410.05993)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.core.types import Batch, Images, ModelOutput, RouterStats
from cantata.models.aria.config import (
    AriaProjectorConfig,
    AriaTextConfig,
    AriaVisionConfig,
    OtherTower,
    Tower,
)
from cantata.models.aria.decoder import DecoderBlock
from cantata.models.aria.hf import AriaLayout, read_hub_config
from cantata.models.aria.processor import AriaProcessor
from cantata.models.aria.projector import Projector
from cantata.models.aria.vision import VisionTower
from cantata.models.lora import base_names
from cantata.models.protocol import DecodingStep, HubPart, Unit
from cantata.nn.attention import PackedAttention
from cantata.nn.head import LanguageHead
from cantata.nn.moe.balance import BalanceConfig
from cantata.nn.moe.layer import MoELayer
from cantata.nn.rope import rotary_tables


class Decoder(nn.Module):
    """Holds the decoder's parts; `Aria.forward` runs them one by one."""

    def __init__(self, config: AriaTextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))


class Aria(nn.Module):
    """The whole model, from packed tokens and patches to the loss.

    vision, projector, text: shapes and settings of the three parts; `vision` may be another family's tower.
    image_token_id: the placeholder that image features replace.
    weights: Hugging Face directory to start from, or null for random weights; the recipe reads it.
    """

    def __init__(
        self,
        vision: AriaVisionConfig | OtherTower,
        projector: AriaProjectorConfig,
        text: AriaTextConfig,
        image_token_id: int,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.vision_config, self.projector_config, self.text_config = vision, projector, text
        self.image_token_id = image_token_id
        self.weights = weights
        if weights is not None and not isinstance(vision, AriaVisionConfig):
            raise ConfigError(
                "model.weights names an Aria, which has a tower of its own; set it to null, and "
                "model.vision.weights to the tower's folder"
            )
        self.vision: Tower = VisionTower(vision) if isinstance(vision, AriaVisionConfig) else vision.build()
        heads = vision.num_attention_heads
        self.projector = Projector(projector, vision.hidden_size, heads, text.hidden_size)
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
        x_TD = self.text.embed_tokens(batch.input_ids_T)
        if step is None or step.is_prefill:
            features_QD = self.image_features(batch.images)
            x_TD = x_TD.index_copy(0, batch.images.token_index_Q, features_QD.to(x_TD.dtype))
        x_TD, router = self._decode(x_TD, batch, step)
        if step is not None:
            with_logits = True
            x_TD = x_TD.index_select(0, batch.samples.offsets(x_TD.device)[1:] - 1)
        tied_weight_VD = self.text.embed_tokens.weight if self.text_config.tie_word_embeddings else None
        loss_sum, loss_N, logits_TV = self.head(
            x_TD, batch.labels_T, batch.target_index_N, batch.target_weight_N, tied_weight_VD, with_logits
        )
        return ModelOutput(loss_sum, loss_N, router, logits_TV)

    def image_features(self, images: Images) -> Tensor:
        """What stands in for the images' placeholders, (Q, D)."""
        features_QD: Tensor = self.projector(self.vision(images), images.patches, images.features)
        return features_QD

    def _decode(
        self, x_TD: Tensor, batch: Batch, step: DecodingStep | None
    ) -> tuple[Tensor, RouterStats | None]:
        text = self.text_config
        tables = rotary_tables(batch.position_ids_T, text.head_dim, text.rope_theta, x_TD.dtype)
        packed = PackedAttention(batch.samples, causal=True)
        groups = batch.token_groups() if step is None else None
        layers = []
        for index, layer in enumerate(self.text.layers):
            attend = packed if step is None else step.attention(index)
            x_TD, stats = layer(x_TD, tables, groups, attend)
            layers.append(stats)
        if step is not None:
            return x_TD, None
        return x_TD, RouterStats(*(torch.stack(values) for values in zip(*layers, strict=True)))

    def units(self) -> Sequence[Unit]:
        """What to shard, in forward's order.

        What no unit holds belongs to the root: the frozen `post_layernorm`, and a tied embedding, which is
        needed at both ends of forward.
        """
        tied = self.text_config.tie_word_embeddings
        return [
            *([] if tied else [Unit("text.embed_tokens", self.text.embed_tokens, False)]),
            Unit("vision.embeddings", self.vision.embeddings, False),
            *(Unit(f"vision.layers.{i}", layer, True) for i, layer in enumerate(self.vision.layers)),
            Unit("projector", self.projector, False),
            *(Unit(f"text.layers.{i}", layer, True) for i, layer in enumerate(self.text.layers)),
            Unit("head", self.head, False),
        ]

    def parts(self) -> Sequence[HubPart]:
        """Another family's tower, where it comes from a folder of its own."""
        if isinstance(self.vision_config, AriaVisionConfig):
            return ()
        names = {name for name, _ in self.named_parameters() if name.startswith("vision.")}
        part = self.vision_config.part(frozenset(names))
        return () if part is None else (part,)

    def moe_layers(self) -> Sequence[MoELayer]:
        """The decoder's MoE layers, first to last."""
        return [layer.mlp for layer in self.text.layers if isinstance(layer, DecoderBlock)]

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill with the initial value: norms 1, biases 0, the rest normal with the section's range."""
        sections = {
            "vision": self.vision_config.initializer_range,
            "projector": self.projector_config.initializer_range,
        }
        std = sections.get(name.partition(".")[0], self.text_config.initializer_range)
        with torch.no_grad():
            if name.endswith(("bias", "expert_bias_E")):
                tensor.zero_()
            elif "norm" in name.split(".")[-2]:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, std, generator=generator)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """6 per active weight (2 forward, 4 backward), plus causal attention over half a sample.

        Under adapters 4 per weight, which gets no gradient of its own; the adapters are left out.
        """
        text, moe = self.text_config, self.text_config.moe
        heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        attention = text.hidden_size * (2 * heads + 2 * kv)
        experts = 3 * text.hidden_size * moe.expert_intermediate_size * (moe.top_k + moe.num_shared_experts)
        layer = attention + experts + text.hidden_size * moe.num_experts
        weights = text.num_hidden_layers * layer + text.hidden_size * text.vocab_size
        per_weight = 4.0 if base_names(self) else 6.0
        return per_weight * weights + 6.0 * text.num_hidden_layers * heads * mean_sample_length

    @property
    def max_positions(self) -> int:
        return self.text_config.max_position_embeddings

    @property
    def token_embedding(self) -> nn.Module:
        return self.text.embed_tokens

    @property
    def balance(self) -> BalanceConfig:
        return self.text_config.moe.balance

    def check_processor(self, processor: Processor) -> None:
        """Raise `ConfigError` where `collator.processor` makes what this model cannot read."""
        wanted: dict[str, tuple[int, int | None, str]] = {
            "image_token": (processor.image_token_id, self.image_token_id, "model.image_token_id"),
            "patch_size": (processor.patch_values, self.vision_config.patch_values, "values of a patch"),
        }
        if isinstance(processor, AriaProcessor):
            true_positions = self.vision_config.true_positions
            wanted["true_positions"] = (processor.true_positions, true_positions, "model.vision")
            side, grid = processor.image_size // processor.patch_size, self.vision_config.grid
            features = self.projector_config.patch_to_query.get(side**2)
            wanted["position_grid"] = (processor.position_grid, grid, "model.vision.image_size / patch_size")
            wanted["features_per_image"] = (
                processor.features_per_image,
                features,
                f"model.projector.patch_to_query of {side**2} patches",
            )
        for key, (found, needed, source) in wanted.items():
            if found != needed:
                raise ConfigError(
                    f"collator.processor.{key} gives {found}; the model needs {needed} ({source})"
                )
        if processor.vocab_size > self.text_config.vocab_size:
            raise ConfigError(
                f"collator.processor.tokenizer has {processor.vocab_size} tokens, more than "
                f"model.text.vocab_size={self.text_config.vocab_size}"
            )

    def hub_layout(self) -> AriaLayout:
        return AriaLayout(self.vision_config, self.projector_config, self.text_config, self.image_token_id)


def aria_from_hub(directory: str | Path) -> Aria:
    """Build the model that a Hugging Face directory describes; its weights are not read."""
    vision, projector, text, image_token_id = read_hub_config(directory)
    return Aria(vision, projector, text, image_token_id, weights=str(directory))
