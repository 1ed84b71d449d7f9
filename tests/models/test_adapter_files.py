"""Adapters in PEFT's format: read back bit for bit, and refused in one line where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterReader,
    read_lora_config,
    whole,
)
from cantata.models.aria import Aria
from cantata.models.lora import LoRAConfig
from tests.models.adapters import Base, lora, published, write
from tests.models.aria.small import small_aria

CONFIG = lora(
    targets=["*.q_proj", "*.experts.*", "head", "text.embed_tokens"],
    ranks={"*.fc2": 2},
    modules_to_save=["*.router.weight", "head.norm.*"],
)
ROUTER = "base_model.model.model.language_model.layers.0.mlp.router.weight"
QUERY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return published(tmp_path_factory.mktemp("base") / "hub")


@pytest.fixture(scope="module")
def model(base: Base) -> Aria:
    return base.adapted(CONFIG)


@pytest.fixture
def adapter(base: Base, model: Aria, tmp_path: Path) -> Path:
    write(base, model, CONFIG, tmp_path / "adapter")
    return tmp_path / "adapter"


def read(base: Base, model: Aria, adapter: Path, config: LoRAConfig = CONFIG) -> AdapterReader:
    return AdapterReader(adapter, base.layout, model, config, base.reader())


def refusal(base: Base, model: Aria, adapter: Path, config: LoRAConfig = CONFIG) -> str:
    with pytest.raises(ConfigError) as caught:
        read(base, model, adapter, config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(adapter) in message
    return message


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


def change_config(adapter: Path, **changes: Any) -> None:
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_read_back_bit_for_bit_and_in_slices(base: Base, model: Aria, adapter: Path) -> None:
    reader = read(base, model, adapter)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(reader) == trained
    for name in reader:
        value = model.get_parameter(name)
        assert torch.equal(reader.read(name, whole(value.shape)), value), name
        part = tuple(slice(1, 2) for _ in value.shape)
        assert torch.equal(reader.read(name, part), value[part]), name


def test_the_config_of_a_folder(base: Base, adapter: Path) -> None:
    model = small_aria(base.layout)
    found = read_lora_config(adapter, base.layout, model)
    reader = read(base, base.adapted(found), adapter, found)
    assert (found.r, found.alpha, found.dora) == (4, 8, False)
    assert {name for name, rank in found.ranks.items() if rank == 2} == {
        f"text.layers.{i}.mlp.experts.fc2" for i in (0, 1)
    }
    assert len(list(reader)) == len(list(read(base, base.adapted(CONFIG), adapter)))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_every_difference_in_one_line(base: Base, model: Aria, adapter: Path) -> None:
    change_config(adapter, r=16, lora_alpha=4, use_rslora=True)

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[ROUTER]
        tensors[QUERY] = torch.zeros(4, 31)
        tensors["base_model.model.lm_heart.lora_A.weight"] = torch.zeros(4, 32)

    change_tensors(adapter, damage)
    message = refusal(base, model, adapter)
    assert "use_rslora is true, lora.rslora=false" in message
    assert "text.layers.0.self_attn.q_proj 16 instead of 4" in message
    assert "of another alpha than lora.alpha=8: vision.layers.0.self_attn.q_proj 4" in message
    assert f"1 missing: {ROUTER}" in message
    assert "1 unexpected: base_model.model.lm_heart.lora_A.weight" in message
    assert f"1 misshapen: {QUERY} [4, 31] instead of [4, 32]" in message


def test_what_it_holds_of_the_base_must_be_the_bases(base: Base, model: Aria, adapter: Path) -> None:
    key = "base_model.model.lm_head.base_layer.weight"
    weight = small_aria(base.layout).head.weight
    assert weight is not None
    change_tensors(adapter, lambda tensors: tensors.update({key: weight.detach().clone()}))
    read(base, model, adapter)
    change_tensors(adapter, lambda tensors: tensors[key].add_(1e-3))
    assert f"1 other than in the base: {key}" in refusal(base, model, adapter)


def test_trained_in_full_there_and_not_here(base: Base, adapter: Path) -> None:
    config = lora(targets=CONFIG.targets, ranks=CONFIG.ranks, modules_to_save=["head.norm.*"])
    assert f"other than in the base: {ROUTER}" in refusal(base, base.adapted(config), adapter, config)


def test_what_peft_computes_without(base: Base, tmp_path: Path) -> None:
    """peft writes factors of the projector's attention where `out_proj` is targeted, and never uses them."""
    name = "model.multi_modal_projector.cross_attn.multihead_attn.out_proj"
    config = lora(targets=["projector.cross_attn.out_proj"])
    config_file = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["out_proj"]}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config_file))
    prefix = f"base_model.model.{name}"
    factors = {f"{prefix}.lora_A.weight": torch.ones(4, 32), f"{prefix}.lora_B.weight": torch.zeros(32, 4)}
    save_file(factors, tmp_path / ADAPTER_WEIGHTS)
    read(base, base.adapted(config), tmp_path, config)
    change_tensors(tmp_path, lambda tensors: tensors[f"{prefix}.lora_B.weight"].add_(1))
    assert "not zero that PEFT computes without" in refusal(base, base.adapted(config), tmp_path, config)


def test_a_truncated_file_and_none(base: Base, model: Aria, adapter: Path) -> None:
    path = adapter / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: cannot be read" in refusal(base, model, adapter)
    path.unlink()
    assert f"{path}: cannot be read" in refusal(base, model, adapter)
    (adapter / ADAPTER_CONFIG).unlink()
    assert "no adapter_config.json" in refusal(base, model, adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only 'LORA'"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the base"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is no pattern"),
        ({"r": "a"}, "adapter_config.json: r must be an integer, not 'a'"),
        ({"lora_alpha": "z"}, "lora_alpha must be a number, not 'z'"),
        ({"rank_pattern": []}, "rank_pattern must be a mapping, not []"),
        ({"alpha_pattern": {"lm_head": "x"}}, "alpha_pattern.lm_head must be a number"),
        ({"target_parameters": "abc"}, "target_parameters must be a list, not 'abc'"),
        ({"target_modules": 3}, "target_modules must be a string or a list, not 3"),
    ],
)
def test_adapters_that_are_not_built_here(
    base: Base, model: Aria, adapter: Path, change: dict[str, Any], message: str
) -> None:
    change_config(adapter, **change)
    assert message in refusal(base, model, adapter)


def test_targets_may_be_a_pattern_and_null_is_absent(base: Base, model: Aria, adapter: Path) -> None:
    change_config(adapter, target_modules=".*q_proj", alpha_pattern=None)
    read(base, model, adapter)


def test_folders_that_describe_no_adapter_of_this_model(base: Base, adapter: Path) -> None:
    change_config(adapter, alpha_pattern={"lm_head": 3})
    with pytest.raises(ConfigError, match="alphas 3, 8; only one for all"):
        read_lora_config(adapter, base.layout, small_aria(base.layout))
    save_file({"other": torch.zeros(1)}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(ConfigError, match="none of its 1 keys adapts a part of Aria"):
        read_lora_config(adapter, base.layout, small_aria(base.layout))
