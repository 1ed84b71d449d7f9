"""AIMv2 on the Hugging Face hub: names and settings of an image encoder and of the contrastive model.

Written is what transformers' `Aimv2VisionModel` and `Aimv2Model` load; Apple's own folders are read as well,
and written by `apple.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.models.aimv2 import names
from cantata.models.aimv2.config import Aimv2TextConfig, Aimv2VisionConfig
from cantata.models.aimv2.hub_processor import write_processor
from cantata.models.hub import CONFIG, read_json

VISION_TYPE, WHOLE_TYPE = "aimv2_vision_model", "aimv2"
"""`model_type` of an image encoder alone and of the contrastive model. Apple calls both `aimv2`."""

_TOWER = "vision_model."

_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0, "qkv_bias": False}
"""Settings that are built in one way alone, as both sides write them."""
_BUILT: dict[str, Any] = {**_FIXED, "mlp_bias": False, "use_bias": False, "projection_dropout": 0.0}
"""The same, as any side may have them."""

_VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "rms_norm_eps": 1e-5,
    "is_native": False,
    "initializer_range": 0.02,
}
_TEXT_ABSENT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
"""What a key means that a published `config.json` leaves out."""


class Aimv2VisionLayout(NamedTuple):
    """The hub's names, shapes and `config.json` of an image encoder."""

    vision: Aimv2VisionConfig

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter; `KeyError` for one that is no part of the encoder."""
        hub = names.to_hub(name)
        if not hub.startswith(_TOWER):
            raise KeyError(name)
        return hub.removeprefix(_TOWER)

    def hub_key(self, stored: str) -> str | tuple[str, ...] | None:
        """The hub's keys that a key of a file, transformers' or Apple's, stands for."""
        return names.from_file(stored)

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """The patch embedding is a convolution there, and the head's query has leading dimensions."""
        return vision_shape(self.vision, name, shape)

    def transformers_name(self, name: str) -> str:
        """What `Aimv2VisionModel` calls a native parameter, once it is loaded."""
        return self.to_hub(name)

    def is_attention_output(self, name: str) -> bool:
        """No attention is an `nn.MultiheadAttention` there."""
        return False

    def hub_config(self) -> dict[str, object]:
        """`config.json` of `Aimv2VisionModel`."""
        return {"architectures": ["Aimv2VisionModel"], **_vision_to_hub(self.vision)}

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """See `hub_processor.write_processor`."""
        return write_processor(processor, self.vision, directory, with_text=False)


class Aimv2Layout(NamedTuple):
    """The hub's names, shapes and `config.json` of a contrastive model."""

    vision: Aimv2VisionConfig
    text: Aimv2TextConfig
    projection_dim: int
    max_logit_scale: float

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter; `KeyError` for a name that the model does not have."""
        return names.to_hub(name)

    def hub_key(self, stored: str) -> str | tuple[str, ...] | None:
        """The hub's keys that a key of a file, transformers' or Apple's, stands for."""
        return names.from_file(stored)

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """As of an image encoder; the scale is a scalar there."""
        return torch.Size(()) if name == "logit_scale" else vision_shape(self.vision, name, shape)

    def transformers_name(self, name: str) -> str:
        """What `Aimv2Model` calls a native parameter, once it is loaded."""
        return self.to_hub(name)

    def is_attention_output(self, name: str) -> bool:
        """No attention is an `nn.MultiheadAttention` there."""
        return False

    def hub_config(self) -> dict[str, object]:
        """`config.json` of `Aimv2Model`."""
        return {
            "architectures": ["Aimv2Model"],
            "model_type": WHOLE_TYPE,
            "projection_dim": self.projection_dim,
            "max_logit_scale": self.max_logit_scale,
            "vision_config": _vision_to_hub(self.vision),
            "text_config": {
                "model_type": "aimv2_text_model",
                **_FIXED,
                "mlp_bias": False,
                **asdict(self.text),
            },
        }

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """See `hub_processor.write_processor`."""
        return write_processor(processor, self.vision, directory, with_text=True)


def vision_shape(vision: Aimv2VisionConfig, name: str, shape: torch.Size) -> torch.Size:
    """The shape that transformers' tensor of an encoder's parameter has."""
    if name == "vision.embeddings.patch_embed.weight":
        return torch.Size((shape[0], vision.num_channels, vision.patch_size, vision.patch_size))
    return torch.Size((1, 1, *shape)) if name == "vision.head.cls_token" else shape


def _vision_to_hub(vision: Aimv2VisionConfig) -> dict[str, object]:
    return {"model_type": VISION_TYPE, **_FIXED, "mlp_bias": False, **asdict(vision)}


def read_hub_config(directory: str | Path) -> Aimv2VisionLayout | Aimv2Layout:
    """Settings of a published AIMv2, in transformers' or Apple's words.

    Raises `ConfigError` where the directory holds no AIMv2 or one with parts that are not built here.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)
    if config.get("model_type") not in (VISION_TYPE, WHOLE_TYPE):
        raise ConfigError(
            f"{path}: model_type is {config.get('model_type')!r}, none of {VISION_TYPE}, {WHOLE_TYPE}"
        )
    if "vision_config" in config:
        text = _section(config.get("text_config") or {}, _TEXT_ABSENT, path, "text_config.")
        return Aimv2Layout(
            _vision(config["vision_config"], path, "vision_config.", use_head=True),
            Aimv2TextConfig(**text),
            int(config.get("projection_dim", 512)),
            float(config.get("max_logit_scale", 100.0)),
        )
    # Apple's encoders have no head, and their configs no word of it.
    return Aimv2VisionLayout(_vision(config, path, "", use_head=config["model_type"] == VISION_TYPE))


def encoder_config(directory: str | Path) -> Aimv2VisionConfig:
    """Settings of a published image encoder; raises `ConfigError` where the directory holds another model."""
    layout = read_hub_config(directory)
    if not isinstance(layout, Aimv2VisionLayout):
        raise ConfigError(f"{directory} holds a contrastive model; give the folder of an image encoder")
    return layout.vision


def _vision(config: dict[str, Any], path: Path, key: str, *, use_head: bool) -> Aimv2VisionConfig:
    return Aimv2VisionConfig(**_section(config, _VISION_ABSENT | {"use_head": use_head}, path, key))


def _section(config: dict[str, Any], absent: dict[str, Any], path: Path, key: str) -> dict[str, Any]:
    """The values of one section; raises `ConfigError` for what is not built here."""
    for name, built in _BUILT.items():
        found = config.get(name, built)
        if found != built:
            raise ConfigError(f"{path}: {key}{name} is {found!r}; only {built!r} is supported")
    section = {name: config.get(name, value) for name, value in absent.items()}
    for name, value in section.items():
        if isinstance(value, list):
            raise ConfigError(f"{path}: {key}{name} is {value!r}; only one number is supported")
    return section
