"""Which weights rest packed, in which place, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cantata.core.errors import ConfigError
from cantata.models.aria import Aria
from cantata.models.lora import LoRAConfig, apply_lora, base_names, packed_names
from cantata.nn.lora import PackedWeight, Packing
from cantata.parallel.fake_world import fake_world
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.parallel.pack import base_note, pack_base
from tests.models.aria.small import small_layout
from tests.models.test_lora import CONFIG

NF4 = replace(CONFIG, targets=["*.self_attn.*"], quantize_base=Packing.nf4)
CPU = torch.device("cpu")


def build(lora: LoRAConfig, **changes: Any) -> Aria:
    with torch.device("meta"):
        model = Aria(*small_layout(**changes))
        apply_lora(model, lora)
    return model


def pack(model: nn.Module, ranks: int = 1, ep: int = 1, *, compile: bool = False) -> None:
    with fake_world(ranks):
        pack_base(model, torch.float32, build_mesh(MeshConfig(1, -1, ep), ranks, "cpu"), compile=compile)


def test_matrices_of_the_repeated_blocks_are_packed_adapted_or_not() -> None:
    model = build(NF4)
    names = packed_names(model)
    leaves = {name.split(".", 3)[-1] for name in names if name.startswith("text.")}
    assert leaves == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"mlp.experts.fc{i}" for i in (1, 2)),
    }
    assert all(name.startswith(("text.layers.", "vision.layers.")) for name in names)
    own, base = dict(model.named_parameters()), base_names(model)
    pack(model)
    after = dict(model.named_parameters())
    assert own.keys() - after.keys() == names <= base
    buffers = {name: b for name, b in model.named_buffers() if isinstance(b, PackedWeight)}
    assert {name: b.shape for name, b in buffers.items()} == {name: own[name].shape for name in names}
    assert not names & {name for name, _ in persistent_tensors(model)}, "checkpoints hold the adapter alone"
    assert base_note(model) == ", base nf4"


def test_what_is_trained_in_full_is_not_packed() -> None:
    saved = "text.layers.0.self_attn.q_proj.weight"
    assert saved not in packed_names(build(replace(NF4, targets=["head"], modules_to_save=[saved])))


def test_values_come_from_the_source_of_the_whole_base() -> None:
    model = build(NF4)
    source = RandomInit(model, 3)
    pack(model)
    materialize(model, source, CPU)
    for name in packed_names(model):
        weight = model.get_buffer(name)
        assert isinstance(weight, PackedWeight)
        expected = PackedWeight.empty(weight.shape, torch.float32, Packing.nf4, CPU)
        expected.copy_(source.read(name, ()))
        assert torch.equal(weight.unpack(), expected.unpack())


def test_a_rank_packs_the_experts_that_are_its_own() -> None:
    model = build(NF4)
    whole = model.get_parameter("text.layers.0.mlp.experts.fc1").shape
    pack(model, ranks=2, ep=2)
    spread = model.get_buffer("text.layers.0.mlp.experts.fc1")
    assert isinstance(spread, DTensor)
    assert spread.shape == whole
    assert spread.to_local().shape == (whole[0] // 2, *whole[1:])
    assert isinstance(model.get_buffer("text.layers.0.mlp.shared_experts.up_proj.weight"), PackedWeight)


def test_nothing_happens_unasked() -> None:
    model = build(replace(NF4, quantize_base=Packing.none))
    before = dict(model.named_parameters())
    pack(model, compile=True)
    assert dict(model.named_parameters()) == before
    assert base_note(model) == ""


def test_compiled_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile=true is not offered with lora\.quantize_base=nf4"):
        pack(build(NF4), compile=True)
