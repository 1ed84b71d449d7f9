"""The language model out of every published layout of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cantata.core.errors import ConfigError
from cantata.models.emu3 import emu3_from_hub
from cantata.models.hub import load_from_hub, save_to_hub
from tests.models.emu3.small import small_config, small_emu3

LAYOUTS = {
    "authors": {"model.": "model.", "lm_head.": "lm_head."},
    "transformers": {"model.": "text_model.model.", "lm_head.": "text_model.lm_head."},
    "transformers in memory": {"model.": "model.text_model.", "lm_head.": "lm_head."},
}


def rewrite(folder: Path, prefixes: dict[str, str], more: dict[str, torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for prefix, other in prefixes.items():
        tensors = {
            key.replace(prefix, other, 1) if key.startswith(prefix) else key: t for key, t in tensors.items()
        }
    save_file(tensors | more, folder / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(tmp_path: Path, layout: str) -> None:
    expected = small_emu3(small_config(), seed=2)
    folder = tmp_path / "hub"
    save_to_hub(expected, expected.hub_layout(), folder, max_shard_bytes=10**9)
    more = {"model.vqmodel.quantize.embedding.weight": torch.zeros(3, 2), "vqmodel.x": torch.zeros(1)}
    rewrite(folder, LAYOUTS[layout], more)
    model = emu3_from_hub(folder)
    load_from_hub(model, model.hub_layout(), folder)
    for (name, found), weight in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, weight), name


def test_other_keys_are_still_an_error(tmp_path: Path) -> None:
    model = small_emu3(small_config())
    folder = tmp_path / "hub"
    save_to_hub(model, model.hub_layout(), folder, max_shard_bytes=10**9)
    rewrite(folder, {}, {"adapter.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"1 unexpected: adapter\.weight"):
        load_from_hub(model, model.hub_layout(), folder)


def test_a_whole_model_as_transformers_saves_it(tmp_path: Path) -> None:
    """`Emu3ForConditionalGeneration`, its image tokenizer included."""
    transformers = pytest.importorskip("transformers")
    text: dict[str, Any] = small_emu3(small_config()).hub_layout().hub_config()
    vq = {
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "codebook_size": 8,
        "hidden_size": 32,
    }
    names = {"<image>": 60, "<|extra_200|>": 61, "<|visual token 000000|>": 62}
    config = transformers.Emu3Config(text_config=text, vq_config=vq, vocabulary_map=names)
    torch.manual_seed(0)
    reference = transformers.Emu3ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "emu3"
    model = emu3_from_hub(tmp_path)
    load_from_hub(model, model.hub_layout(), tmp_path)
    assert torch.equal(model.head.weight, reference.lm_head.weight)
    theirs = dict(reference.model.text_model.named_parameters())
    for name, found in model.text.named_parameters():
        assert torch.equal(found, theirs[name]), name
