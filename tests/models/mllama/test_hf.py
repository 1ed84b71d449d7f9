"""Names and settings of published Mllamas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.mllama import Mllama
from cantata.models.mllama.hf import CLIP_MEAN, read_hub_config
from cantata.nn.rope import Llama3Scaling
from tests.data.helpers import mini_processor
from tests.models.mllama.small import small_layout

LAYOUT, ALONE = small_layout(), small_layout(None)


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_every_name_has_a_key_of_its_own() -> None:
    for layout, beginnings in (
        (LAYOUT, {"language_model", "vision_model", "multi_modal_projector"}),
        (ALONE, {"model", "lm_head"}),
    ):
        with torch.device("meta"):
            names = [name for name, _ in Mllama(*layout).named_parameters()]
        keys = [layout.to_hub(name) for name in names]
        assert len(set(keys)) == len(keys)
        assert {key.partition(".")[0] for key in keys} == beginnings
        with pytest.raises(KeyError):
            layout.to_hub("experts.weight")


def test_names_of_text_alone_and_of_what_it_passes_over() -> None:
    assert ALONE.hub_key("language_model.model.norm.weight") == "model.norm.weight"
    assert ALONE.hub_key("model.norm.weight") == "model.norm.weight"
    assert ALONE.hub_key("vision_model.class_embedding") is None
    assert ALONE.hub_key("multi_modal_projector.bias") is None
    assert LAYOUT.hub_key("vision_model.class_embedding") == "vision_model.class_embedding"


def test_the_patch_embedding_is_a_convolution() -> None:
    name = "vision.embeddings.patch_embedding.weight"
    assert LAYOUT.hub_shape(name, torch.Size((16, 48))) == (16, 3, 4, 4)
    assert LAYOUT.hub_shape("projector.weight", torch.Size((4, 2))) == (4, 2)


def test_what_a_published_config_leaves_out(tmp_path: Path) -> None:
    """The 11B model, of which only the tile's size is not transformers' default."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = {
        "model_type": "mllama",
        "text_config": {"rope_scaling": rope, "eos_token_id": [128001, 128008, 128009]},
        "vision_config": {"image_size": 560},
    }
    vision, text, image_token_id = read_hub_config(write(tmp_path, config))
    assert image_token_id == text.vocab_size == 128256
    assert text.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert (text.head_dim, text.eos_token_id, text.rope_theta) == (128, 128001, 500000.0)
    assert list(text.cross_attention_layers) == list(range(3, 40, 5))
    assert vision is not None
    assert (vision.positions, vision.padded_positions, vision.feature_size) == (1601, 1608, 7680)
    assert tuple(vision.image_mean) == CLIP_MEAN


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "dropout", 0.1),
        ("text_config", "tie_word_embeddings", True),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "supported_aspect_ratios", [[1, 1], [2, 1], [1, 2]]),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, section: str, key: str, value: Any) -> None:
    config = LAYOUT.hub_config()
    assert isinstance(config[section], dict)
    config[section][key] = value
    with pytest.raises(ConfigError, match=f"{key} is .*; only .* is supported"):
        read_hub_config(write(tmp_path, config))


def test_other_rotations_and_other_models_are_refused(tmp_path: Path) -> None:
    config = ALONE.hub_config() | {"rope_parameters": {"rope_type": "yarn"}}
    with pytest.raises(ConfigError, match="rope_type is 'yarn'"):
        read_hub_config(write(tmp_path, config))
    with pytest.raises(ConfigError, match="model_type is 'llama', none of mllama"):
        read_hub_config(write(tmp_path, {"model_type": "llama"}))


def test_another_familys_processor_is_told_of(tmp_path: Path) -> None:
    assert LAYOUT.write_processor(mini_processor(), tmp_path) == [
        "no tokenizer files: AriaProcessor has none for Mllama"
    ]
