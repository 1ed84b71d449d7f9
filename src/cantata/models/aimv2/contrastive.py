"""AIMv2's contrastive model: the image encoder and a text tower, into one space (LiT, arXiv:2111.07991).

I  images    S  texts, as many    D  width of the shared space
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.core.types import Batch, Images, Segments
from cantata.models.aimv2.config import Aimv2TextConfig, Aimv2VisionConfig
from cantata.models.aimv2.hf import Aimv2Layout, Aimv2VisionLayout, encoder_config, read_hub_config
from cantata.models.aimv2.initial import init_parameter
from cantata.models.aimv2.processor import Aimv2PairProcessor, check_images
from cantata.models.aimv2.text import TextTower
from cantata.models.aimv2.vision import VisionTower
from cantata.models.protocol import HubPart, PairFeatures, Unit
from cantata.nn.matmul import Linear
from cantata.nn.moe.layer import MoELayer


class Aimv2Contrastive(nn.Module):
    """Images and texts as unit vectors that agree where they belong together.

    vision: shapes and settings of the image encoder, with its head.
    text: those of the text tower.
    projection_dim: width of the shared space.
    max_logit_scale: largest factor of the similarities.
    weights: Hugging Face directory to start from, or null for random weights; the recipe reads it.
    vision_weights: directory of an image encoder alone to start the image tower from, or null.
    """

    balance = None
    """It has no experts."""

    def __init__(
        self,
        vision: Aimv2VisionConfig,
        text: Aimv2TextConfig,
        projection_dim: int,
        max_logit_scale: float,
        weights: str | None = None,
        vision_weights: str | None = None,
    ) -> None:
        super().__init__()
        if not vision.use_head:
            raise ConfigError("model.vision.use_head=false: the contrastive model needs one feature an image")
        if weights is not None and vision_weights is not None:
            raise ConfigError("model.weights and model.vision_weights are both given; set one to null")
        self.vision_config, self.text_config = vision, text
        self.projection_dim, self.max_logit_scale = projection_dim, max_logit_scale
        self.weights, self.vision_weights = weights, vision_weights
        self.vision = VisionTower(vision)
        self.text = TextTower(text)
        self.visual_projection = Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = Linear(text.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, batch: Batch) -> PairFeatures:
        """Features of the pairs of a packed micro-batch, the images' in the order of the texts'."""
        image_ID = self.image_features(batch.images)
        text_SD = self.text_features(batch.input_ids_T, batch.position_ids_T, batch.samples)
        return PairFeatures(image_ID, text_SD, self.scale())

    def image_features(self, images: Images) -> Tensor:
        """Unit vectors, (I, D), fp32."""
        return F.normalize(self.visual_projection(self.vision.pooled(images)).float(), dim=-1)

    def text_features(self, input_ids_T: Tensor, position_ids_T: Tensor, texts: Segments) -> Tensor:
        """Unit vectors, (S, D), fp32."""
        features_SD = self.text(input_ids_T, position_ids_T, texts)
        return F.normalize(self.text_projection(features_SD).float(), dim=-1)

    def scale(self) -> Tensor:
        """Factor of the similarities, at most `max_logit_scale`; fp32 scalar."""
        # The only one's sum is no view, which FSDP's hooks would warn of.
        return self.logit_scale.float().exp().clamp_max(self.max_logit_scale).sum()

    def units(self) -> Sequence[Unit]:
        """What to shard, in forward's order. Projections, pooling and the scale belong to the root."""
        return [
            Unit("vision.embeddings", self.vision.embeddings, False),
            *(Unit(f"vision.layers.{i}", layer, True) for i, layer in enumerate(self.vision.layers)),
            Unit("text.embeddings", self.text.embeddings, False),
            *(Unit(f"text.layers.{i}", layer, True) for i, layer in enumerate(self.text.layers)),
        ]

    def moe_layers(self) -> Sequence[MoELayer]:
        """None."""
        return ()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill with the initial value: norms 1, biases 0, the rest normal with the tower's range."""
        section = self.vision_config if name.startswith("vis") else self.text_config
        init_parameter(name, tensor, generator, section.initializer_range)

    def parts(self) -> Sequence[HubPart]:
        """The image tower, where it comes from a folder of its own; its head stays new if that has none.

        Raises `ConfigError` where the folder holds no image encoder.
        """
        if self.vision_weights is None:
            return ()
        found = encoder_config(self.vision_weights)
        names = {name for name, _ in self.named_parameters() if name.startswith("vision.")}
        if not found.use_head:
            names = {name for name in names if not name.startswith("vision.head.")}
        return (HubPart(frozenset(names), self.vision_weights, Aimv2VisionLayout(self.vision_config)),)

    def flops_per_token(self, mean_sample_length: float) -> float:
        """Of the text tower: 6 per weight, plus causal attention over half a text."""
        text = self.text_config
        layer = text.hidden_size * (4 * text.hidden_size + 3 * text.intermediate_size)
        attention = 6.0 * text.num_hidden_layers * text.hidden_size * mean_sample_length
        return 6.0 * text.num_hidden_layers * layer + attention

    def check_processor(self, processor: Processor) -> None:
        """Raise `ConfigError` where `collator.processor` makes what this model cannot read."""
        if not isinstance(processor, Aimv2PairProcessor):
            raise ConfigError(
                f"collator.processor is {type(processor).__name__}; the contrastive model learns from pairs: "
                "set collator=aimv2_pairs or collator=aimv2_pairs_mini"
            )
        check_images(self.vision_config, processor)
        text = self.text_config
        limits = {
            "max_length": (processor.max_length, text.max_position_embeddings, "max_position_embeddings"),
            "tokenizer": (processor.vocab_size, text.vocab_size, "vocab_size"),
        }
        for key, (found, most, source) in limits.items():
            if found > most:
                raise ConfigError(
                    f"collator.processor.{key} gives {found}, more than model.text.{source}={most}"
                )
        [end] = processor.stop_token_ids
        if end != text.eos_token_id:
            raise ConfigError(
                f"collator.processor.text_end is token {end}, model.text.eos_token_id={text.eos_token_id}"
            )

    def hub_layout(self) -> Aimv2Layout:
        return Aimv2Layout(self.vision_config, self.text_config, self.projection_dim, self.max_logit_scale)


def contrastive_from_hub(directory: str | Path) -> Aimv2Contrastive:
    """Build the contrastive model that a Hugging Face directory describes; its weights are not read.

    Raises `ConfigError` where the directory holds another model.
    """
    layout = read_hub_config(directory)
    if not isinstance(layout, Aimv2Layout):
        raise ConfigError(f"{directory} holds an image encoder alone; the contrastive model has a text tower")
    return Aimv2Contrastive(*layout, weights=str(directory))
