"""AIMv2 in pretraining: the encoder and a decoder of patches and text (Fini et al., arXiv:2411.14402)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.core.types import Batch, Images
from cantata.models.aimv2.config import Aimv2DecoderConfig, Aimv2VisionConfig
from cantata.models.aimv2.decoder import Decoder, PixelHead
from cantata.models.aimv2.hf import Aimv2VisionLayout
from cantata.models.aimv2.initial import init_parameter
from cantata.models.aimv2.processor import Aimv2PairProcessor, Aimv2Processor, check_images
from cantata.models.aimv2.vision import VisionTower, normalised_patches
from cantata.models.protocol import DecodingStep, HubPart, PatchOutput, Unit
from cantata.nn.attention import PackedAttention
from cantata.nn.head import LanguageHead
from cantata.nn.moe.layer import MoELayer
from cantata.nn.rope import rotary_tables

_TOWER = "vision."


class Aimv2Pretraining(nn.Module):
    """Packed patches and text to the loss of the text and to predicted patches.

    Every patch has a place in the packed tokens, in which its feature stands. What stands at a place predicts
    what comes next: the next patch of an image, from its prefix on, or the next token of a text.

    vision: shapes and settings of the encoder.
    decoder: those of the decoder, which nothing but training needs: a published folder holds the encoder.
    weights: Hugging Face directory of an encoder to start from, or null for random weights.
    """

    balance = None
    """It has no experts."""

    def __init__(
        self, vision: Aimv2VisionConfig, decoder: Aimv2DecoderConfig, weights: str | None = None
    ) -> None:
        super().__init__()
        if vision.use_head:
            raise ConfigError("model.vision.use_head=true: pretraining has no use for a pooling head")
        self.vision_config, self.decoder_config = vision, decoder
        self.weights = weights
        self.vision = VisionTower(vision)
        self.decoder = Decoder(decoder, vision.hidden_size)
        self.head = LanguageHead(decoder.hidden_size, decoder.vocab_size, decoder.rms_norm_eps, tied=False)
        self.pixel_head = PixelHead(decoder, vision.patch_values)

    def forward(
        self, batch: Batch, *, with_logits: bool = False, step: DecodingStep | None = None
    ) -> PatchOutput:
        """The text's loss of a packed micro-batch and its predicted patches; its logits (T, V) if asked.

        With a step of a generation: only the logits after each sample, (S, V); see `protocol.Decodes`. Images
        of a prompt are read whole, whatever their prefix.
        """
        images = batch.images if step is None else replace(batch.images, prefix=None)
        x_TD = self.decoder.embed_tokens(batch.input_ids_T)
        if step is None or step.is_prefill:
            features_PD = self.decoder.connector(self.vision(images))
            x_TD = x_TD.index_copy(0, images.token_index_Q, features_PD.to(x_TD.dtype))
        x_TD = self._decode(x_TD, batch, step)
        predicted_RC = self.pixel_head(x_TD.index_select(0, _places_before(images)))
        if step is not None:
            with_logits = True
            x_TD = x_TD.index_select(0, batch.samples.offsets(x_TD.device)[1:] - 1)
        loss_sum, loss_N, logits_TV = self.head(
            x_TD, batch.labels_T, batch.target_index_N, batch.target_weight_N, None, with_logits
        )
        patches_PC = normalised_patches(images.patches_PC)
        return PatchOutput(loss_sum, loss_N, None, logits_TV, predicted_RC, patches_PC)

    def _decode(self, x_TD: Tensor, batch: Batch, step: DecodingStep | None) -> Tensor:
        config = self.decoder_config
        tables = rotary_tables(batch.position_ids_T, config.head_dim, config.rope_theta, x_TD.dtype)
        packed = PackedAttention(batch.samples, causal=True)
        for index, layer in enumerate(self.decoder.layers):
            x_TD = layer(x_TD, tables, packed if step is None else step.attention(index))
        return x_TD

    def units(self) -> Sequence[Unit]:
        """What to shard, in forward's order; the encoder's last norm and the connector belong to the root."""
        return [
            Unit("decoder.embed_tokens", self.decoder.embed_tokens, False),
            Unit("vision.embeddings", self.vision.embeddings, False),
            *(Unit(f"vision.layers.{i}", layer, True) for i, layer in enumerate(self.vision.layers)),
            *(Unit(f"decoder.layers.{i}", layer, True) for i, layer in enumerate(self.decoder.layers)),
            Unit("pixel_head", self.pixel_head, False),
            Unit("head", self.head, False),
        ]

    def moe_layers(self) -> Sequence[MoELayer]:
        """None."""
        return ()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill with the initial value: norms 1, biases 0, the rest normal with the section's range."""
        section = self.vision_config if name.startswith(_TOWER) else self.decoder_config
        init_parameter(name, tensor, generator, section.initializer_range)

    def parts(self) -> Sequence[HubPart]:
        """The encoder, where `weights` names one."""
        if self.weights is None:
            return ()
        names = frozenset(name for name, _ in self.named_parameters() if self.is_published(name))
        return (HubPart(names, self.weights, self.hub_layout()),)

    def is_published(self, name: str) -> bool:
        """Only the encoder is."""
        return name.startswith(_TOWER)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """Of the decoder: 6 per weight, plus causal attention over half a sample."""
        config = self.decoder_config
        size = config.hidden_size
        layer = size * (4 * size + 3 * config.intermediate_size)
        weights = config.num_hidden_layers * layer + size * config.vocab_size
        return 6.0 * weights + 6.0 * config.num_hidden_layers * size * mean_sample_length

    @property
    def max_positions(self) -> int:
        return self.decoder_config.max_position_embeddings

    @property
    def token_embedding(self) -> nn.Module:
        return self.decoder.embed_tokens

    def check_processor(self, processor: Processor) -> None:
        """Raise `ConfigError` where `collator.processor` makes what this model cannot read."""
        if not isinstance(processor, Aimv2Processor) or isinstance(processor, Aimv2PairProcessor):
            raise ConfigError(
                f"collator.processor is {type(processor).__name__}; pretraining puts a placeholder for every "
                "patch: set collator=aimv2_224, aimv2_native or aimv2_mini"
            )
        check_images(self.vision_config, processor)
        if processor.vocab_size > self.decoder_config.vocab_size:
            raise ConfigError(
                f"collator.processor.tokenizer has {processor.vocab_size} tokens, more than "
                f"model.decoder.vocab_size={self.decoder_config.vocab_size}"
            )

    def hub_layout(self) -> Aimv2VisionLayout:
        return Aimv2VisionLayout(self.vision_config)


def _places_before(images: Images) -> Tensor:
    """The place before each predicted patch: that of the patch before it, which every prefix has."""
    index_R, _ = images.predicted()
    device = images.token_index_Q.device
    return images.token_index_Q.index_select(0, (index_R - 1).to(device, non_blocking=True))
