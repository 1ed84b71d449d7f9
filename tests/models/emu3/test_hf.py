"""Names and settings of published Emu3s."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.emu3 import Emu3
from cantata.models.emu3.hf import Emu3Layout, read_hub_config
from tests.data.helpers import mini_processor
from tests.models.emu3.small import small_config

LAYOUT = Emu3Layout(small_config())


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_keys_are_llamas_and_unknown_names_are_refused() -> None:
    with torch.device("meta"):
        names = [name for name, _ in Emu3(*LAYOUT).named_parameters()]
    keys = [LAYOUT.to_hub(name) for name in names]
    assert len(set(keys)) == len(keys)
    assert {key.partition(".")[0] for key in keys} == {"model", "lm_head"}
    assert LAYOUT.to_hub("text.layers.3.self_attn.q_proj.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert LAYOUT.to_hub("head.norm.weight") == "model.norm.weight"
    assert LAYOUT.transformers_name("head.weight") == "lm_head.weight"
    assert LAYOUT.hub_shape("head.weight", torch.Size((4, 2))) == (4, 2)
    assert not LAYOUT.is_attention_output("text.layers.3.self_attn.o_proj.weight")
    with pytest.raises(KeyError):
        LAYOUT.to_hub("vision.weight")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("text_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("text_model.lm_head.weight", "lm_head.weight"),
        ("text_model.norm.weight", "model.norm.weight"),
        ("model.vqmodel.quantize.embedding.weight", None),
        ("vqmodel.encoder.conv_in.weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("adapter.weight", "adapter.weight"),
    ],
)
def test_keys_of_every_published_layout(stored: str, expected: str | None) -> None:
    assert LAYOUT.hub_key(stored) == expected


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "rope_theta": 5e5, "dropout": 0.0}])
def test_the_config_survives_the_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    layout = Emu3Layout(small_config(**changes))
    assert read_hub_config(write(tmp_path, layout.hub_config())) == layout


@pytest.mark.parametrize("model_type", ["Emu3", "emu3"])
def test_a_config_of_the_authors_and_of_a_whole_model(tmp_path: Path, model_type: str) -> None:
    """What they leave out is as published."""
    told = {"rope_theta": 1000000.0, "num_hidden_layers": 32, "vocab_size": 184622, "attention_dropout": 0.1}
    config = told if model_type == "Emu3" else {"text_config": told, "vq_config": {"embed_dim": 4}}
    text = read_hub_config(write(tmp_path, {"model_type": model_type, **config})).text
    assert (text.hidden_size, text.head_dim, text.num_key_value_heads) == (4096, 128, 8)
    assert (text.intermediate_size, text.rms_norm_eps, text.rope_theta) == (14336, 1e-5, 1e6)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (151849, 151850, 151643)
    assert (text.dropout, text.max_position_embeddings) == (0.1, 9216)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', none of emu3_text_model, emu3, Emu3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
    ],
)
def test_what_is_not_built_here_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_hub_config(write(tmp_path, LAYOUT.hub_config() | change))


def test_another_familys_processor_is_told_of(tmp_path: Path) -> None:
    notes = LAYOUT.write_processor(mini_processor(), tmp_path)
    assert notes == ["no tokenizer files: AriaProcessor has none for Emu3"]
    assert list(tmp_path.iterdir()) == []
