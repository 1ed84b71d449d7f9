"""Names and settings of published Arias."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.aria import Aria
from cantata.models.aria.hf import read_hub_config
from tests.models.aria.small import small_layout


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_keys_are_unique_and_unknown_names_are_refused() -> None:
    layout = small_layout()
    with torch.device("meta"):
        names = [name for name, _ in Aria(*layout).named_parameters()]
    keys = [layout.to_hub(name) for name in names]
    assert len(set(keys)) == len(keys)
    assert (
        layout.to_hub("text.layers.11.mlp.experts.fc2")
        == "language_model.model.layers.11.mlp.experts.fc2.weight"
    )
    with pytest.raises(KeyError):
        layout.to_hub("adapter.weight")


def test_the_patch_embedding_is_a_convolution_there() -> None:
    layout = small_layout()
    name = "vision.embeddings.patch_embedding.weight"
    assert layout.hub_shape(name, torch.Size((32, 12))) == (32, 3, 2, 2)
    assert layout.hub_shape("head.weight", torch.Size((64, 32))) == (64, 32)


@pytest.mark.parametrize("tied", [False, True])
def test_the_config_survives_the_round_trip(tmp_path: Path, tied: bool) -> None:
    layout = small_layout(tie_word_embeddings=tied, rope_theta=5e6)
    assert read_hub_config(write(tmp_path, layout.hub_config())) == layout


def test_an_old_config_that_holds_only_what_differs(tmp_path: Path) -> None:
    config = {
        "model_type": "aria",
        "image_token_index": 9,
        "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 1664,
            "moe_num_experts": 64,
            "moe_topk": 6,
            "num_attention_heads": 20,
            "num_hidden_layers": 28,
            "rope_theta": 5000000,
            "vocab_size": 100352,
        },
        "vision_config": {
            "image_size": 980,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
    vision, projector, text, image_token_id = read_hub_config(write(tmp_path, config))
    assert (vision.hidden_size, vision.grid, vision.layer_norm_eps) == (1152, 70, 1e-6)
    assert projector.patch_to_query == {1225: 128, 4900: 256}
    assert (text.rope_theta, text.head_dim, text.num_key_value_heads) == (5e6, 128, 20)
    assert (text.moe.num_experts, text.moe.top_k, text.moe.num_shared_experts) == (64, 6, 2)
    assert image_token_id == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava', not 'aria'"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2; only -1"),
        ({"text_config": {"attention_bias": True}}, "text_config.attention_bias is True"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
    ],
)
def test_what_is_not_built_here_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = small_layout().hub_config() | change
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hub_config(write(tmp_path, config))


def test_no_directory_no_config_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_hub_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_hub_config(tmp_path)
