"""Names and settings of published tokenizers of Emu3."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.emu3.vqvae import emu3_vqvae_from_hub
from cantata.models.emu3.vqvae.hf import read_hub_config
from tests.models.emu3.vqvae.small import small_shape, small_vqvae


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_the_config_survives_the_round_trip(tmp_path: Path) -> None:
    layout = small_vqvae(small_shape(temporal_factor=2)).hub_layout()
    assert read_hub_config(write(tmp_path, layout.hub_config())) == layout


def test_a_config_of_defaults_is_the_published_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = emu3_vqvae_from_hub(write(tmp_path, {"model_type": "emu3_vqgan"}))
    assert sum(parameter.numel() for parameter in model.parameters()) == 270_740_287
    assert model.grid(8, 512, 256) == (2, 64, 32)


def test_keys_are_unique_and_unknown_names_are_refused() -> None:
    model = small_vqvae(small_shape())
    layout = model.hub_layout()
    keys = [layout.to_hub(name) for name in model.state_dict()]
    assert len(set(keys)) == len(keys)
    assert layout.to_hub("decoder.stages.0.resample.conv.bias") == "decoder.up_block.up.1.upsample.conv.bias"
    with pytest.raises(KeyError):
        layout.to_hub("adapter.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "emu3"}, "model_type is 'emu3'"),
        ({"double_latent": True}, "double_latent is True; only False"),
        ({"embed_dim": 8}, "embed_dim is 8; only 4"),
        ({"hidden_size": 128}, "hidden_size is 128; only 64"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2"),
        ({"base_channels": 40}, "each must be a multiple of 32"),
    ],
)
def test_what_is_not_built_here_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = small_vqvae(small_shape()).hub_layout().hub_config() | change
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hub_config(write(tmp_path, config))


def test_attention_at_levels_of_other_widths_is_not_published() -> None:
    layout = small_vqvae(small_shape(attention_levels=(0,))).hub_layout()
    with pytest.raises(ConfigError, match="attention_levels"):
        layout.hub_config()
