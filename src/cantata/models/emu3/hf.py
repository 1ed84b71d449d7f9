"""Emu3's language model on the Hugging Face hub: names and settings, both ways.

Written is what transformers' `Emu3ForCausalLM` loads; the keys are those of the authors' folders too. A whole
`Emu3ForConditionalGeneration` is read as well, without its image tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.models.emu3.config import Emu3TextConfig
from cantata.models.emu3.hub_processor import write_processor
from cantata.models.emu3.processor import Emu3Processor
from cantata.models.hub import CONFIG, read_json

MODEL_TYPES = ("emu3_text_model", "emu3", "Emu3")
"""Of a language model alone, of a whole model, and of the authors' folders."""

_NAMES = (
    (r"^text\.", "model."),
    (r"^head\.norm\.", "model.norm."),
    (r"^head\.weight$", "lm_head.weight"),
)
"""Native name to hub key."""

_OTHER_KEYS = (
    (r"^(?:model\.)?text_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?text_model\.(?:model\.)?", "model."),
)
"""Keys of a whole model, of this and of older versions of transformers, to those of the language model."""

_NOT_OURS = re.compile(r"^(?:model\.)?vqmodel\.|\.rotary_emb\.inv_freq$")

_ABSENT: dict[str, Any] = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "attention_dropout": 0.1,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 151849,
    "eos_token_id": 151850,
    "pad_token_id": 151643,
}
"""What a key means that a published `config.json` leaves out."""

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
)
"""Settings that are called and mean the same on both sides."""


class Emu3Layout(NamedTuple):
    """The hub's names, shapes and `config.json` of one Emu3."""

    text: Emu3TextConfig

    @property
    def image_token_id(self) -> int:
        """No token stands for features of an image."""
        return Emu3Processor.image_token_id

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter; `KeyError` for a name that Emu3 does not have."""
        for pattern, key in _NAMES:
            hub, matches = re.subn(pattern, key, name)
            if matches:
                return hub
        raise KeyError(name)

    def hub_key(self, stored: str) -> str | None:
        """The hub's key that a key of a file stands for; None where it is of no language model."""
        if _NOT_OURS.search(stored):
            return None
        for pattern, key in _OTHER_KEYS:
            hub, matches = re.subn(pattern, key, stored)
            if matches:
                return hub
        return stored

    def transformers_name(self, name: str) -> str:
        """What `Emu3ForCausalLM` calls a native parameter, once it is loaded."""
        return self.to_hub(name)

    def is_attention_output(self, name: str) -> bool:
        """No attention is an `nn.MultiheadAttention` there."""
        return False

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """All shapes are alike."""
        return shape

    def hub_config(self) -> dict[str, object]:
        """`config.json` of `Emu3ForCausalLM`."""
        return {
            "architectures": ["Emu3ForCausalLM"],
            "model_type": MODEL_TYPES[0],
            **{name: getattr(self.text, name) for name in _SAME},
            "head_dim": self.text.head_dim,
            "eos_token_id": self.text.eos_token_id,
            "attention_dropout": self.text.dropout,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.text.rope_theta},
        }

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """See `hub_processor.write_processor`; another family's processor is told of and left out."""
        if not isinstance(processor, Emu3Processor):
            return [f"no tokenizer files: {type(processor).__name__} has none for Emu3"]
        return write_processor(processor, directory)


def read_hub_config(directory: str | Path) -> Emu3Layout:
    """Settings of a published Emu3.

    Raises `ConfigError` where the directory holds no Emu3 or one with parts that are not built here.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"{path}: model_type is {model_type!r}, none of {', '.join(MODEL_TYPES)}")
    text = _ABSENT | (config.get("text_config", {}) if model_type == "emu3" else config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wanted = {
        "hidden_act": (text["hidden_act"], "silu"),
        "attention_bias": (text["attention_bias"], False),
        "mlp_bias": (text["mlp_bias"], False),
        "rope_parameters.rope_type": (rope_type, "default"),
    }
    for key, (found, built) in wanted.items():
        if found != built:
            raise ConfigError(f"{path}: {key} is {found!r}; only {built!r} is supported")
    heads, eos = text["num_attention_heads"], text["eos_token_id"]
    text["num_key_value_heads"] = text["num_key_value_heads"] or heads
    return Emu3Layout(
        Emu3TextConfig(
            **{name: text[name] for name in _SAME},
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]),
            dropout=float(text["attention_dropout"]),
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
        )
    )
