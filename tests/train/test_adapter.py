"""First values of an adapted model, and the identity of the weights that it adapts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.nn.lora import LoRASettings, adapt
from cantata.nn.matmul import Linear
from cantata.parallel.materialize import Index
from cantata.train.adapter import AdapterValues, BaseIdentity, digest

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
    assert torch.equal(values.read("proj.lora_magnitude", (slice(1, 4),)), WEIGHT[1:4].norm(dim=1))


def test_saved_values_go_before_new_ones_and_before_the_base() -> None:
    saved = {"proj.lora_A": torch.ones(2, 3), "proj.weight": -WEIGHT}
    values = AdapterValues(Adapted(), BASE, Values(saved), seed=1)
    assert torch.equal(values.read("proj.lora_A", ALL), torch.ones(2, 3))
    assert torch.equal(values.read("proj.weight", ALL), -WEIGHT)
    assert not values.read("proj.lora_B", ALL).any()


def test_a_checkpoint_knows_its_base(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((50_000,), value)}, tmp_path / name / "model.safetensors")
    state = BaseIdentity(str(tmp_path / "one"), 7).state_dict()
    os.rename(tmp_path / "one", tmp_path / "moved")
    BaseIdentity(str(tmp_path / "moved"), 8).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"adapts other weights \(model.weights=.*one\) than these"):
        BaseIdentity(str(tmp_path / "other"), 7).load_state_dict(state)


def test_random_bases_are_known_by_their_seed() -> None:
    state = BaseIdentity(None, 7).state_dict()
    BaseIdentity(None, 7).load_state_dict(state)
    with pytest.raises(ConfigError, match="adapts other weights"):
        BaseIdentity(None, 8).load_state_dict(state)


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_the_digest_sees_the_beginning_the_middle_and_the_end(tmp_path: Path, place: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    before = digest(tmp_path)
    content = bytearray(300_000)
    content[place] = 1
    file.write_bytes(content)
    assert digest(tmp_path) != before
