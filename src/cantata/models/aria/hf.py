"""Aria on the Hugging Face hub: names and settings, both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.models.aria.config import (
    AriaMoEConfig,
    AriaProjectorConfig,
    AriaTextConfig,
    AriaVisionConfig,
    OtherTower,
)
from cantata.models.aria.hub_processor import write_processor
from cantata.models.aria.processor import AriaProcessor
from cantata.models.hub import CONFIG, read_json
from cantata.nn.moe.balance import BalanceConfig

_NAMES = (
    (r"vision\.layers\.", "vision_tower.encoder.layers."),
    (r"vision\.", "vision_tower."),
    (r"projector\.cross_attn\.(in_proj_|out_proj\.)", r"multi_modal_projector.cross_attn.multihead_attn.\1"),
    (r"projector\.feed_forward\.fc1\.", "multi_modal_projector.feed_forward.linear_in."),
    (r"projector\.feed_forward\.fc2\.", "multi_modal_projector.feed_forward.linear_out."),
    (r"projector\.", "multi_modal_projector."),
    (r"text\.(.*\.experts\.fc[12])$", r"language_model.model.\1.weight"),
    (r"text\.", "language_model.model."),
    (r"head\.norm\.", "language_model.model.norm."),
    (r"head\.weight", "language_model.lm_head.weight"),
)
"""Native name to hub key; the first pattern that matches the beginning decides."""

_IN_MEMORY = (
    (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
    (r"^language_model\.(lm_head\.)", r"\1"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
"""Hub key to the name in transformers' model in memory."""

_PATCHES = "vision.embeddings.patch_embedding.weight"

_VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "gelu_pytorch_tanh",
}
_TEXT_ABSENT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "moe_num_experts": 8,
    "moe_topk": 2,
    "moe_num_shared_experts": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""What a key means that a published `config.json` leaves out (older ones hold only what differs)."""


class AriaLayout(NamedTuple):
    """The hub's names, shapes and `config.json` of one Aria."""

    vision: AriaVisionConfig | OtherTower
    projector: AriaProjectorConfig
    text: AriaTextConfig
    image_token_id: int

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter; `KeyError` for a name that Aria does not have."""
        for pattern, key in _NAMES:
            hub, matches = re.subn("^" + pattern, key, name)
            if matches:
                return hub
        raise KeyError(name)

    def hub_key(self, stored: str) -> str | None:
        """Files hold the hub's keys and no others."""
        return stored

    def transformers_name(self, name: str) -> str:
        """What `AriaForConditionalGeneration` calls a native parameter, once it is loaded."""
        hub = self.to_hub(name)
        for pattern, key in _IN_MEMORY:
            hub = re.sub(pattern, key, hub)
        return hub

    def is_attention_output(self, name: str) -> bool:
        """The projector's attention is an `nn.MultiheadAttention` there."""
        return name.startswith("projector.cross_attn.out_proj.")

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """The patch embedding is a convolution there: (D, channels, rows, columns)."""
        if name != _PATCHES or not isinstance(self.vision, AriaVisionConfig):
            return shape
        side = self.vision.patch_size
        return torch.Size((shape[0], self.vision.num_channels, side, side))

    def hub_config(self) -> dict[str, object]:
        """`config.json` of `AriaForConditionalGeneration`.

        Raises `ConfigError` for node-limited routing and for another tower, which that class does not have.
        """
        if not isinstance(self.vision, AriaVisionConfig):
            raise ConfigError(
                f"model.vision is {type(self.vision).__name__}, no part of a published Aria; ask the run"
            )
        moe = self.text.moe
        if moe.top_groups < moe.num_groups:
            raise ConfigError(
                f"model.text.moe.top_groups={moe.top_groups} of {moe.num_groups} groups limits the routing, "
                "and a published Aria has no place for that: it would route differently; set top_groups to "
                "num_groups and train on before publishing"
            )
        return {
            "architectures": ["AriaForConditionalGeneration"],
            "model_type": "aria",
            "image_token_index": self.image_token_id,
            "initializer_range": self.text.initializer_range,
            "projector_patch_to_query_dict": {str(k): v for k, v in self.projector.patch_to_query.items()},
            "text_config": _text_to_hub(self.text),
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "vision_config": _vision_to_hub(self.vision),
            "vision_feature_layer": -1,
        }

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """See `hub_processor.write_processor`; another family's processor is told of and left out."""
        if not isinstance(processor, AriaProcessor):
            return [f"no tokenizer files: {type(processor).__name__} has none for Aria"]
        return write_processor(processor, self.projector, directory)


def _vision_to_hub(vision: AriaVisionConfig) -> dict[str, object]:
    names = [name for name in _VISION_ABSENT if name != "hidden_act"]
    settings = {name: getattr(vision, name) for name in names}
    return {"model_type": "idefics3_vision", "hidden_act": "gelu_pytorch_tanh", **settings}


def _text_to_hub(text: AriaTextConfig) -> dict[str, object]:
    return {
        "model_type": "aria_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": text.tie_word_embeddings,
        "initializer_range": text.initializer_range,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "intermediate_size": text.moe.expert_intermediate_size,
        "moe_num_experts": text.moe.num_experts,
        "moe_topk": text.moe.top_k,
        "moe_num_shared_experts": text.moe.num_shared_experts,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
    }


def read_hub_config(directory: str | Path) -> AriaLayout:
    """Settings of a published Aria.

    Balance losses and the bias are off: a published config does not know them. Raises `ConfigError`
    where the directory holds no Aria or one with parts that are not built here.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)
    if config.get("model_type") != "aria":
        raise ConfigError(f"{path}: model_type is {config.get('model_type')!r}, not 'aria'")
    vision = _VISION_ABSENT | config.get("vision_config", {})
    text = _TEXT_ABSENT | config.get("text_config", {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    wanted = {
        "vision_config.hidden_act": (vision["hidden_act"], "gelu_pytorch_tanh"),
        "text_config.hidden_act": (text["hidden_act"], "silu"),
        "text_config.attention_bias": (text["attention_bias"], False),
        "text_config.mlp_bias": (text["mlp_bias"], False),
        "text_config.rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "vision_feature_layer": (config.get("vision_feature_layer", -1), -1),
    }
    for key, (found, built) in wanted.items():
        if found != built:
            raise ConfigError(f"{path}: {key} is {found!r}; only {built!r} is supported")
    queries = config.get("projector_patch_to_query_dict") or {1225: 128, 4900: 256}
    projector = AriaProjectorConfig(
        patch_to_query={int(k): int(v) for k, v in queries.items()},
        initializer_range=config.get("initializer_range", 0.02),
    )
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    theta = float(rope.get("rope_theta", text["rope_theta"]))
    image_token_id = config.get("image_token_index", 9)
    return AriaLayout(_vision_from_hub(vision), projector, _text_from_hub(text, theta, tied), image_token_id)


def _vision_from_hub(vision: dict[str, Any]) -> AriaVisionConfig:
    return AriaVisionConfig(**{name: vision[name] for name in _VISION_ABSENT if name != "hidden_act"})


def _text_from_hub(text: dict[str, Any], theta: float, tied: bool) -> AriaTextConfig:
    heads, size = text["num_attention_heads"], text["hidden_size"]
    eos = text["eos_token_id"]
    return AriaTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=size,
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or size // heads,
        rope_theta=theta,
        rms_norm_eps=text["rms_norm_eps"],
        max_position_embeddings=text["max_position_embeddings"],
        tie_word_embeddings=tied,
        initializer_range=text["initializer_range"],
        bos_token_id=text["bos_token_id"],
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        pad_token_id=text["pad_token_id"],
        moe=AriaMoEConfig(
            num_experts=text["moe_num_experts"],
            top_k=text["moe_topk"],
            num_shared_experts=text["moe_num_shared_experts"],
            expert_intermediate_size=text["intermediate_size"],
            num_groups=1,
            top_groups=1,
            balance=BalanceConfig(
                aux_loss_coef=0.0,
                aux_loss_groups=text["moe_num_experts"],
                modality_aux_loss_coef={},
                sequence_aux_loss_coef=0.0,
                z_loss_coef=0.0,
                bias_update_rate=0.0,
            ),
        ),
    )
