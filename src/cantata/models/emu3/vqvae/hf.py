"""Emu3's tokenizer on the Hugging Face hub: names and settings, both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cantata.core.errors import ConfigError
from cantata.core.samples import Processor
from cantata.models.autoencoder.hf import write_preprocessor
from cantata.models.emu3.vqvae.config import Emu3VQVAEConfig
from cantata.models.hub import CONFIG, read_json

COLOURS = 3

_NAMES = (
    (r"temporal_encoder\.downs\.(\d+)\.conv\.", r"encoder.time_conv.\1.conv.conv."),
    (r"temporal_decoder\.ups\.(\d+)\.conv\.", r"decoder.time_conv.\1.conv.conv."),
    (r"temporal_(encoder|decoder)\.blocks\.", r"\1.time_res_stack."),
    (r"quantizer\.codebook_KD$", "quantize.embedding.weight"),
    (r"encoder\.stages\.(\d+)\.", r"encoder.down_block.down.\1."),
    (r"(encoder|decoder)\.middle\.", r"\1.middle_block."),
    (r"(encoder|decoder)\.head\.(norm|conv)\.", r"\1.\2_out."),
    (r"(encoder\.conv_in|decoder\.conv_in|quant_conv\.conv|post_quant_conv\.conv)\.", r"\1."),
)
"""Native name to hub key; the first pattern that matches the beginning decides."""

_PARTS = (
    (r"\.middle_block\.block(\d)\.", r".middle_block.block_\1."),
    (r"\.middle_block\.attention\.norm\.", ".middle_block.attn_norm."),
    (r"\.middle_block\.attention\.", ".middle_block.attn_1."),
    (r"\.blocks\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(down\.\d+)\.resample\.", r"\1.downsample."),
    (r"(up\.\d+)\.resample\.", r"\1.upsample."),
    (r"\.norm\.(weight|bias)$", r".norm_layer.\1"),
    (r"\.scale\.", ".conv_y."),
    (r"\.shift\.", ".conv_b."),
)
"""What is called otherwise inside of a level."""

_STAGE = re.compile(r"decoder\.stages\.(\d+)\.")
_LINEAR_NORM = re.compile(r"\.(scale|shift)\.weight$")

_ABSENT: dict[str, Any] = {
    "codebook_size": 32768,
    "embed_dim": 4,
    "latent_channels": 4,
    "double_latent": False,
    "in_channels": COLOURS,
    "out_channels": COLOURS,
    "temporal_downsample_factor": 4,
    "base_channels": 256,
    "channel_multiplier": [1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [3],
    "hidden_size": 1024,
    "num_attention_heads": 1,
    "attention_dropout": 0.0,
}
"""What a key means that a published `config.json` leaves out."""


class Emu3VQVAELayout(NamedTuple):
    """The hub's names, shapes and `config.json` of one tokenizer."""

    shape: Emu3VQVAEConfig
    num_codes: int

    def hub_key(self, stored: str) -> str | None:
        """Files hold the hub's keys and no others."""
        return stored

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter or buffer; `KeyError` for a name that the model has not."""
        stage = _STAGE.match(name)
        if stage is not None:
            level = len(self.shape.channel_multipliers) - 1 - int(stage[1])
            return _within(f"decoder.up_block.up.{level}.{name[stage.end() :]}")
        for pattern, key in _NAMES:
            hub, matches = re.subn("^" + pattern, key, name)
            if matches:
                return _within(hub)
        raise KeyError(name)

    def transformers_name(self, name: str) -> str:
        """In memory it is called as on the hub."""
        return self.to_hub(name)

    def is_attention_output(self, name: str) -> bool:
        return False

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """What scales and shifts norms are 1 x 1 convolutions there."""
        return torch.Size((*shape, 1, 1)) if _LINEAR_NORM.search(name) else shape

    def hub_config(self) -> dict[str, object]:
        """`config.json` of `Emu3VQVAE`.

        Raises `ConfigError` for attention at a level of another width than the coarsest: that class has one
        width for all attention.
        """
        shape = self.shape
        widths = shape.encoder.widths
        if any(widths[level] != widths[-1] for level in shape.attention_levels):
            raise ConfigError(
                f"model.shape.attention_levels={list(shape.attention_levels)} of levels of {widths} channels "
                f"cannot be published: transformers' attention has {widths[-1]} everywhere"
            )
        return {
            **_ABSENT,
            "architectures": ["Emu3VQVAE"],
            "model_type": "emu3_vqgan",
            "codebook_size": self.num_codes,
            "embed_dim": shape.z_channels,
            "latent_channels": shape.z_channels,
            "temporal_downsample_factor": shape.temporal_factor,
            "base_channels": shape.base_channels,
            "channel_multiplier": list(shape.channel_multipliers),
            "num_res_blocks": shape.num_res_blocks,
            "attn_resolutions": list(shape.attention_levels),
            "hidden_size": widths[-1],
        }

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """`preprocessor_config.json` of transformers' `Emu3ImageProcessor`, with pixels from -1 to 1."""
        settings: dict[str, object] = {
            "image_processor_type": "Emu3ImageProcessor",
            "do_resize": True,
            "resample": 3,
            "min_pixels": 512 * 512,
            "max_pixels": 1024 * 1024,
            "spatial_factor": self.shape.factor,
        }
        write_preprocessor(directory, settings)
        return []


def read_hub_config(directory: str | Path) -> Emu3VQVAELayout:
    """Settings of a published tokenizer.

    Raises `ConfigError` where the directory holds none, or one with parts that are not built here.
    """
    path = Path(directory) / CONFIG
    config = _ABSENT | read_json(path)
    if config.get("model_type") != "emu3_vqgan":
        raise ConfigError(f"{path}: model_type is {config.get('model_type')!r}, not 'emu3_vqgan'")
    shape = Emu3VQVAEConfig(
        base_channels=config["base_channels"],
        channel_multipliers=tuple(config["channel_multiplier"]),
        num_res_blocks=config["num_res_blocks"],
        attention_levels=tuple(config["attn_resolutions"] or ()),
        z_channels=config["latent_channels"],
        temporal_factor=config["temporal_downsample_factor"],
    )
    built = {
        "double_latent": False,
        "in_channels": COLOURS,
        "out_channels": COLOURS,
        "num_attention_heads": 1,
        "attention_dropout": 0.0,
        "embed_dim": shape.z_channels,
        "hidden_size": shape.encoder.widths[-1],
    }
    for key, value in built.items():
        if config[key] != value:
            raise ConfigError(f"{path}: {key} is {config[key]!r}; only {value!r} is supported")
    return Emu3VQVAELayout(shape, config["codebook_size"])


def _within(key: str) -> str:
    for pattern, replacement in _PARTS:
        key = re.sub(pattern, replacement, key)
    return key
