"""First values of an adapted model, and the identity of the weights that it adapts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.nn.lora import LoRASettings, Packing, adapt
from cantata.nn.matmul import Linear
from cantata.parallel.materialize import Index
from cantata.train.adapter import AdapterValues, BaseIdentity, digest
from tests.models.test_lora import CONFIG as LORA

WEIGHT = torch.arange(12.0).view(4, 3)


class Values:
    """A source out of a dictionary."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def read(self, name: str, index: Index) -> Tensor:
        return self.tensors[name][index]


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.proj = adapt(Linear(3, 4, bias=False), LoRASettings(2, 4.0, 0.0, rslora=False, dora=True))

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        raise AssertionError(f"{name} is held by the base")


BASE = Values({"proj.weight": WEIGHT})
ALL = (slice(None),)


def test_new_adapters_leave_the_model_as_it_was() -> None:
    values = AdapterValues(Adapted(), BASE, None, seed=1)
    assert list(values) == ["proj.weight", "proj.lora_A", "proj.lora_B", "proj.lora_magnitude"]
    assert torch.equal(values.read("proj.weight", (slice(1, 3),)), WEIGHT[1:3])
    assert not values.read("proj.lora_B", ALL).any()
    a = values.read("proj.lora_A", ALL)
    assert a.any()
    assert a.abs().max() <= 3**-0.5
    assert torch.equal(values.read("proj.lora_A", (slice(1, 2),)), a[1:2]), "a part is a part of the whole"
    assert not torch.equal(AdapterValues(Adapted(), BASE, None, seed=2).read("proj.lora_A", ALL), a)
    assert not values.read("proj.lora_magnitude", (slice(1, 4),)).any()


def test_saved_values_go_before_new_ones_and_before_the_base() -> None:
    saved = {"proj.lora_A": torch.ones(2, 3), "proj.weight": -WEIGHT}
    values = AdapterValues(Adapted(), BASE, Values(saved), seed=1)
    assert torch.equal(values.read("proj.lora_A", ALL), torch.ones(2, 3))
    assert torch.equal(values.read("proj.weight", ALL), -WEIGHT)
    assert not values.read("proj.lora_B", ALL).any()


def stored(folder: Path, **tensors: Tensor) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_a_checkpoint_knows_its_base(tmp_path: Path) -> None:
    one = stored(tmp_path / "one", w=torch.ones(50_000))
    other = stored(tmp_path / "other", w=torch.full((50_000,), 2.0))
    state = BaseIdentity(one, 7, LORA).state_dict()
    os.rename(one, tmp_path / "moved")
    BaseIdentity(str(tmp_path / "moved"), 8, LORA).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"adapts other weights \(model.weights=.*one\) than these"):
        BaseIdentity(other, 7, LORA).load_state_dict(state)


def test_random_bases_are_known_by_their_seed() -> None:
    state = BaseIdentity(None, 7, LORA).state_dict()
    BaseIdentity(None, 7, replace(LORA, dropout=0.5)).load_state_dict(state)
    with pytest.raises(
        ConfigError, match=r"\(random values of seed=7\) than these \(random values of seed=8\)"
    ):
        BaseIdentity(None, 8, LORA).load_state_dict(state)


@pytest.mark.parametrize("change", [{"alpha": 8.0}, {"rslora": True}, {"quantize_base": Packing.nf4}])
def test_factors_are_not_scaled_otherwise_after_a_resume(change: dict[str, Any]) -> None:
    state = BaseIdentity(None, 7, LORA).state_dict()
    with pytest.raises(ConfigError, match=rf"was trained with lora\.{next(iter(change))}="):
        BaseIdentity(None, 7, replace(LORA, **change)).load_state_dict(state)


@pytest.mark.parametrize("name", ["small", "large", "experts"])
def test_the_digest_sees_a_part_of_every_tensor_and_of_many_experts(tmp_path: Path, name: str) -> None:
    """What merging an adapter into a base changes: whole matrices, or some experts of a stack."""
    tensors = {
        "small": torch.zeros(3),
        "large": torch.zeros(300, 1000),
        "experts": torch.zeros(32, 40, 50),
    }
    before = digest(Path(stored(tmp_path / "before", **tensors)))
    changed = tensors[name].clone()
    changed[10 if name == "experts" else slice(None)] = 1.0
    assert digest(Path(stored(tmp_path / "after", **{**tensors, name: changed}))) != before
    assert digest(Path(stored(tmp_path / "same", **tensors))) == before
