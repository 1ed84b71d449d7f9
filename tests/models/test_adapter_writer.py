"""What PEFT is told of an adapter, and what it has no place for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cantata.core.errors import ConfigError, RunError
from cantata.models import adapter_writer
from cantata.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cantata.models.adapter_writer import NO_DROPOUT, AdapterWriter
from cantata.models.lora import LoRAConfig
from tests.models.adapters import Base, lora, published, value_of, write

LAYER = "model.language_model.layers.1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return published(tmp_path_factory.mktemp("base") / "hub")


def test_names_are_whole_and_settings_those_of_the_run(base: Base, tmp_path: Path) -> None:
    config = lora(targets=["text.layers.1.*.fc?", "head"], dropout=0.05, ranks={"head": 2}, rslora=True)
    notes = write(base, base.adapted(config), config, tmp_path / "adapter")
    assert notes == [NO_DROPOUT]
    written = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert written["target_modules"] == ["lm_head"]
    assert written["target_parameters"] == [f"{LAYER}.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]
    assert (written["r"], written["rank_pattern"]) == (4, {"lm_head": 2})
    assert (written["lora_alpha"], written["lora_dropout"], written["use_rslora"]) == (8, 0.0, True)
    assert written["base_model_name_or_path"] == str(base.folder)


def test_dropout_stays_where_there_are_no_experts(base: Base) -> None:
    config = lora(targets=["head"], dropout=0.05)
    writer = AdapterWriter(base.adapted(config), base.layout, config, None)
    assert writer.peft_config()["lora_dropout"] == 0.05


def test_a_module_saved_in_part_is_written_whole(base: Base, tmp_path: Path) -> None:
    config = lora(targets=["head"], modules_to_save=["text.layers.1.mlp.experts.fc1"])
    model = base.adapted(config)
    write(base, model, config, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    for ours, theirs in (("fc1", "gate_up_proj"), ("fc2", "down_proj")):
        value = model.get_parameter(f"text.layers.1.mlp.experts.{ours}")
        assert torch.equal(tensors[f"base_model.model.{LAYER}.mlp.experts.{theirs}"], value)
    assert len(tensors) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(targets=["projector.*"]), "without the adapter of projector.cross_attn.out_proj"),
        (
            lora(dora=True, targets=["*.q_proj", "*.experts.fc1", "head"]),
            "3 here cannot have it (text.layers.0",
        ),
        (
            lora(targets=["*.experts.fc1"], modules_to_save=["*.experts.fc2"]),
            "adapter of text.layers.0.mlp.experts.fc1 in it would be lost",
        ),
    ],
)
def test_what_peft_has_no_place_for(base: Base, config: LoRAConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterWriter(base.adapted(config), base.layout, config, None)
    assert message in str(caught.value)
    assert "--merge" in str(caught.value)


def test_a_tied_embedding_trained_in_full(tmp_path: Path) -> None:
    tied = published(tmp_path / "hub", tie_word_embeddings=True)
    config = lora(targets=["*.q_proj"], modules_to_save=["text.embed_tokens.*"])
    with pytest.raises(ConfigError, match="the tied embedding was trained in full"):
        AdapterWriter(tied.adapted(config), tied.layout, config, None)


def test_a_full_disk_is_one_line(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_writer, "save_file", full)
    config = lora(targets=["head"])
    model = base.adapted(config)
    with pytest.raises(RunError, match="the adapter cannot be written"):
        AdapterWriter(model, base.layout, config, None).write(tmp_path, value_of(model), None)
