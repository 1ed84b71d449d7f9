"""Mllama on the Hugging Face hub: names and settings, both ways.

A model with its tower is transformers' `MllamaForConditionalGeneration`, one for text alone its
`MllamaForCausalLM`, which is read from a whole checkpoint as well.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.models.hub import CONFIG, read_json
from cantata.models.mllama.config import MllamaTextConfig, MllamaVisionConfig
from cantata.models.mllama.hub_processor import IMAGE_FILE, write_processor
from cantata.models.mllama.processor import MllamaProcessor
from cantata.models.mllama.tiles import canvases
from cantata.nn.rope import Llama3Scaling

MODEL_TYPES = ("mllama", "mllama_text_model")
"""Of a whole model, and of a language model alone."""

_NAMES = (
    (r"vision\.embeddings\.tile_position\.", "vision_model.pre_tile_positional_embedding."),
    (r"vision\.embeddings\.position_gate$", "vision_model.gated_positional_embedding.gate"),
    (r"vision\.embeddings\.position$", "vision_model.gated_positional_embedding.embedding"),
    (r"vision\.embeddings\.canvas_position\.", "vision_model.gated_positional_embedding.tile_embedding."),
    (r"vision\.embeddings\.layernorm\.", "vision_model.layernorm_pre."),
    (r"vision\.embeddings\.", "vision_model."),
    (r"vision\.layers\.", "vision_model.transformer.layers."),
    (r"vision\.between\.layernorm\.", "vision_model.layernorm_post."),
    (r"vision\.between\.tile_position\.", "vision_model.post_tile_positional_embedding."),
    (r"vision\.global_layers\.", "vision_model.global_transformer.layers."),
    (r"projector\.", "multi_modal_projector."),
    (r"text\.", "language_model.model."),
    (r"head\.norm\.", "language_model.model.norm."),
    (r"head\.weight$", "language_model.lm_head.weight"),
)
"""Native name to hub key of a whole model; the first pattern that matches the beginning decides."""

_IN_MEMORY = (
    (r"^language_model\.(lm_head\.)", r"\1"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
)
"""Hub key to the name in transformers' model in memory."""

_PATCHES = "vision.embeddings.patch_embedding.weight"
_OF_IMAGES = ("vision_model.", "multi_modal_projector.")

_VISION_ABSENT: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "max_num_tiles": 4,
    "intermediate_layers_indices": (3, 7, 15, 23, 30),
    "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "hidden_act": "gelu",
}
_TEXT_ABSENT: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38),
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
    "hidden_act": "silu",
    "dropout": 0.0,
    "tie_word_embeddings": False,
}
"""What a key means that a published `config.json` leaves out."""

_SAME_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "pad_token_id",
)
_SAME_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_global_layers",
    "image_size",
    "patch_size",
    "num_channels",
    "max_num_tiles",
    "initializer_range",
)
"""Settings that are called and mean the same on both sides."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""What the published tower was trained with; they stand beside the weights, not in `config.json`."""


class MllamaLayout(NamedTuple):
    """The hub's names, shapes and `config.json` of one Mllama."""

    vision: MllamaVisionConfig | None
    text: MllamaTextConfig
    image_token_id: int

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter; `KeyError` for a name that Mllama does not have."""
        for pattern, key in _NAMES:
            hub, matches = re.subn("^" + pattern, key, name)
            if matches:
                return hub if self.vision is not None else hub.removeprefix("language_model.")
        raise KeyError(name)

    def hub_key(self, stored: str) -> str | None:
        """The hub's key that a key of a file stands for; for text alone, None for what reads images."""
        if self.vision is not None:
            return stored
        return None if stored.startswith(_OF_IMAGES) else stored.removeprefix("language_model.")

    def transformers_name(self, name: str) -> str:
        """What transformers' model calls a native parameter, once it is loaded."""
        hub = self.to_hub(name)
        for pattern, key in _IN_MEMORY:
            hub = re.sub(pattern, key, hub)
        return hub

    def is_attention_output(self, name: str) -> bool:
        """No attention is an `nn.MultiheadAttention` there."""
        return False

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """The patch embedding is a convolution there: (D, channels, rows, columns)."""
        if name != _PATCHES or self.vision is None:
            return shape
        side = self.vision.patch_size
        return torch.Size((shape[0], self.vision.num_channels, side, side))

    def hub_config(self) -> dict[str, object]:
        """`config.json` of `MllamaForConditionalGeneration`, or of `MllamaForCausalLM`."""
        text = _text_to_hub(self.text)
        if self.vision is None:
            return {"architectures": ["MllamaForCausalLM"], **text}
        return {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": MODEL_TYPES[0],
            "image_token_index": self.image_token_id,
            "text_config": text,
            "tie_word_embeddings": False,
            "vision_config": _vision_to_hub(self.vision),
        }

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """See `hub_processor.write_processor`; another family's processor is told of and left out."""
        if not isinstance(processor, MllamaProcessor):
            return [f"no tokenizer files: {type(processor).__name__} has none for Mllama"]
        return write_processor(processor, self.vision, directory)


def _vision_to_hub(vision: MllamaVisionConfig) -> dict[str, object]:
    return {
        "model_type": "mllama_vision_model",
        **{name: getattr(vision, name) for name in _SAME_VISION},
        "attention_heads": vision.num_attention_heads,
        "intermediate_layers_indices": list(vision.intermediate_layers),
        "norm_eps": vision.layer_norm_eps,
        "supported_aspect_ratios": [list(canvas) for canvas in canvases(vision.max_num_tiles)],
        "vision_output_dim": vision.feature_size,
        "hidden_act": "gelu",
    }


def _text_to_hub(text: MllamaTextConfig) -> dict[str, object]:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(text.rope_scaling)}
    return {
        "model_type": MODEL_TYPES[1],
        **{name: getattr(text, name) for name in _SAME_TEXT},
        "cross_attention_layers": list(text.cross_attention_layers),
        "eos_token_id": text.eos_token_id,
        "dropout": 0.0,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }


def read_hub_config(directory: str | Path) -> MllamaLayout:
    """Settings of a published Mllama.

    Raises `ConfigError` where the directory holds no Mllama or one with parts that are not built here.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{path}: model_type is {model_type!r}, none of {', '.join(MODEL_TYPES)}")
    is_whole = model_type == MODEL_TYPES[0]
    text = _TEXT_ABSENT | (config.get("text_config", {}) if is_whole else config)
    _check(
        path,
        {key: (text[key], _TEXT_ABSENT[key]) for key in ("hidden_act", "dropout", "tie_word_embeddings")},
    )
    vision = _vision_from_hub(path, config.get("vision_config", {})) if is_whole else None
    text_config = _text_from_hub(path, text)
    return MllamaLayout(vision, text_config, config.get("image_token_index") or text_config.vocab_size)


def _vision_from_hub(path: Path, given: dict[str, Any]) -> MllamaVisionConfig:
    vision = _VISION_ABSENT | given
    known = [list(canvas) for canvas in canvases(vision["max_num_tiles"])]
    wanted: dict[str, tuple[Any, Any]] = {"hidden_act": (vision["hidden_act"], "gelu")}
    wanted["supported_aspect_ratios"] = (vision.get("supported_aspect_ratios") or known, known)
    _check(path, wanted)
    beside = path.with_name(IMAGE_FILE)
    images = read_json(beside) if beside.is_file() else {}
    return MllamaVisionConfig(
        **{name: vision[name] for name in _SAME_VISION},
        num_attention_heads=vision["attention_heads"],
        intermediate_layers=tuple(vision["intermediate_layers_indices"]),
        layer_norm_eps=vision["norm_eps"],
        image_mean=tuple(images.get("image_mean", CLIP_MEAN)),
        image_std=tuple(images.get("image_std", CLIP_STD)),
    )


def _text_from_hub(path: Path, text: dict[str, Any]) -> MllamaTextConfig:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(
            f"{path}: the rope_type is {rope_type!r}; only 'default' and 'llama3' are supported"
        )
    scaling = None
    if rope_type == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = Llama3Scaling(*(rope[name] for name in names))
    eos = text["eos_token_id"]
    return MllamaTextConfig(
        **{name: text[name] for name in _SAME_TEXT},
        cross_attention_layers=tuple(text["cross_attention_layers"]),
        head_dim=text["hidden_size"] // text["num_attention_heads"],
        rope_theta=float(rope.get("rope_theta", text["rope_theta"])),
        rope_scaling=scaling,
        initial_gate=0.0,
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
    )


def _check(path: Path, wanted: dict[str, tuple[Any, Any]]) -> None:
    for key, (found, built) in wanted.items():
        if found != built:
            raise ConfigError(f"{path}: {key} is {found!r}; only {built!r} is supported")
