"""The estimate against arithmetic by hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cantata.models.lora import apply_lora, packed_names
from cantata.nn.lora import Packing, packed_bytes
from cantata.parallel.mesh import MeshSizes
from cantata.parallel.recompute import Recompute
from cantata.train.ema import AdamWithEMA
from cantata.train.memory import (
    Resting,
    UnitElements,
    estimate_memory,
    fsdp2_layout,
    gathered_bytes,
    layout_of,
    peak_memory_gib,
    zero_layout,
)
from cantata.train.one_rank import Elements, on_one_rank
from cantata.train.options import Offload, Precision, StateDtype
from tests.models.test_lora import CONFIG
from tests.train.test_dry_run import CPU, batch, build

ADAM = partial(torch.optim.AdamW, lr=1e-3)


def test_gradients_fill_up_while_activations_go() -> None:
    model = build("meta")
    layout = fsdp2_layout(Precision.fp32, StateDtype.fp32, Offload.none, shards=1, ep=1)
    once = estimate_memory(model, layout, batch(), Recompute.none, CPU, accumulation_steps=1)
    again = estimate_memory(model, layout, batch(), Recompute.none, CPU, accumulation_steps=2)
    assert again.total - once.gradients <= once.total < again.total
    assert again.gradients == once.gradients


def test_frozen_parameters_need_no_gradient_and_no_state() -> None:
    model = build("meta")
    elements = sum(parameter.numel() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "head.weight")
    layout = fsdp2_layout(Precision.fp32, StateDtype.fp32, Offload.none, shards=1, ep=1)
    estimate = estimate_memory(model, layout, batch(), Recompute.none, CPU, accumulation_steps=2)
    assert estimate.parameters == 4 * elements
    assert estimate.gradients == 4 * 320 * 64
    assert estimate.optimizer == 8 * 320 * 64
    assert estimate.total == sum(estimate.parts().values())


def test_fsdp2_shares_everything() -> None:
    layout = fsdp2_layout(Precision.bf16, StateDtype.bf16, Offload.none, shards=4, ep=1)
    elements = Elements(dense=1001, experts=0)
    assert [kind.of(elements) for kind in (layout.weights, layout.gradients, layout.states)] == [
        502,
        502,
        1004,
    ]
    offloaded = fsdp2_layout(Precision.bf16, StateDtype.fp32, Offload.parameters, shards=1, ep=1)
    assert [kind.of(elements) for kind in (offloaded.weights, offloaded.gradients, offloaded.states)] == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"),
    [(0, 2000, 4000, 12000), (1, 2000, 4000, 3000), (2, 2000, 1000, 3000), (3, 500, 1000, 3000)],
)
def test_zero_shares_more_with_each_stage(stage: int, weights: int, gradients: int, states: int) -> None:
    layout = zero_layout(stage, Precision.bf16, Offload.none, world_size=4, ep=1)
    elements = Elements(dense=600, experts=400)
    assert layout.weights.of(elements) == weights
    assert layout.gradients.of(elements) == gradients
    assert layout.states.of(elements) == states
    assert layout.gathers == (stage == 3)


def test_the_same_experts_are_shared_by_fewer_ranks() -> None:
    # 8 ranks, ep 4: two of them hold the same experts.
    elements = Elements(dense=800, experts=200)
    fsdp2 = fsdp2_layout(Precision.bf16, StateDtype.fp32, Offload.none, shards=8, ep=4)
    assert fsdp2.weights.of(elements) == 4 * (100 + 100)
    zero = zero_layout(2, Precision.bf16, Offload.none, world_size=8, ep=4)
    assert zero.weights.of(elements) == 2 * (800 + 200)
    assert zero.gradients.of(elements) == 4 * (100 + 100)
    assert zero.states.of(elements) == 12 * (100 + 100)


def test_the_layout_of_a_config() -> None:
    mesh = MeshSizes(dp_replicate=2, dp_shard=4, ep=2)
    fsdp2 = {"precision": "bf16", "state_dtype": "fp32", "offload": "none"}
    assert layout_of(fsdp2, ADAM, mesh) == fsdp2_layout(Precision.bf16, StateDtype.fp32, Offload.none, 4, 2)
    deepspeed = {"precision": "fp32", "offload": "optimizer", "zero_stage": 1}
    assert layout_of(deepspeed, ADAM, mesh) == zero_layout(1, Precision.fp32, Offload.optimizer, 8, 2)


def test_averages_are_four_bytes_more_where_states_are() -> None:
    mesh = MeshSizes(dp_replicate=2, dp_shard=4, ep=2)
    averaging = partial(AdamWithEMA, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    for engine, on_device in (
        ({"precision": "bf16", "state_dtype": "bf16", "offload": "none"}, True),
        ({"precision": "bf16", "state_dtype": "fp32", "offload": "parameters"}, False),
        ({"precision": "bf16", "offload": "none", "zero_stage": 2}, True),
        ({"precision": "fp32", "offload": "optimizer", "zero_stage": 1}, False),
    ):
        plain = layout_of(engine, ADAM, mesh)
        each = plain.states.bytes_each + (4 if on_device else 0)
        states = plain.states._replace(bytes_each=each)
        assert layout_of(engine, averaging, mesh) == replace(plain, states=states)


def test_with_more_ranks_for_the_experts_a_rank_holds_and_gathers_fewer() -> None:
    model = build("meta")
    expert = 3 * 64 * 48
    one, four = (
        estimate_memory(
            model,
            fsdp2_layout(Precision.bf16, StateDtype.fp32, Offload.none, shards=4, ep=ep),
            batch(),
            Recompute.none,
            torch.device("meta"),
            accumulation_steps=2,
        )
        for ep in (1, 4)
    )
    assert (one.parameters, one.gradients, one.optimizer) == (four.parameters, four.gradients, four.optimizer)
    # The largest unit is the head or a block; without 6 of its 8 experts it is smaller.
    assert one.gathered - four.gathered <= 6 * expert * (2 + 2 + 2 + 4)
    assert four.gathered < one.gathered
    # Rows that came and rows that are sorted: both are there.
    assert four.activations > one.activations


def test_the_largest_unit_is_gathered_with_the_one_behind_it() -> None:
    layout = fsdp2_layout(Precision.bf16, StateDtype.fp32, Offload.none, shards=2, ep=1)
    units = [UnitElements(10, 10), UnitElements(100, 100), UnitElements(20, 20)]
    assert gathered_bytes(layout, units) == 100 * (2 + 2 + 2 + 4)
    zero = zero_layout(1, Precision.bf16, Offload.none, 2, 1)
    assert gathered_bytes(zero, units) == 100 * (2 + 4)
    # Frozen weights are gathered, too, but have no gradient.
    assert gathered_bytes(layout, [UnitElements(100, 5)]) == 100 * (2 + 2) + 5 * (2 + 4)
    assert gathered_bytes(zero, [UnitElements(100, 5)]) == 5 * (2 + 4)


def test_one_rank_that_computes_in_what_it_keeps_copies_nothing() -> None:
    engine = {"precision": "fp32", "state_dtype": "fp32", "offload": "none"}
    alone = layout_of(engine, ADAM, MeshSizes(dp_replicate=1, dp_shard=1, ep=1))
    assert gathered_bytes(alone, [UnitElements(100, 100)]) == 0
    two = layout_of(engine, ADAM, MeshSizes(dp_replicate=2, dp_shard=1, ep=1))
    assert gathered_bytes(two, [UnitElements(100, 100)]) == 100 * (4 + 4 + 4 + 4)


def test_shards_round_up() -> None:
    assert Resting(4, 3, 2).of(Elements(dense=10, experts=3)) == 4 * (4 + 2)


def test_peak_memory_of_this_process_grows_with_use() -> None:
    before = peak_memory_gib(CPU)
    held = torch.ones(2**27)
    assert held.sum() == 2**27
    assert peak_memory_gib(CPU) >= max(before, 0.5)


def test_a_packed_base_is_whole_on_every_rank_and_unpacked_weight_by_weight() -> None:
    lora = replace(CONFIG, targets=["text.layers.*"], quantize_base=Packing.nf4)
    adapted, packed = build("meta"), build("meta")
    apply_lora(adapted, replace(lora, quantize_base=Packing.none))
    apply_lora(packed, lora)
    layout = fsdp2_layout(Precision.bf16, StateDtype.fp32, Offload.none, shards=4, ep=2)
    without, with_it = (
        estimate_memory(model, layout, batch(), Recompute.none, CPU, accumulation_steps=2)
        for model in (adapted, packed)
    )
    local = on_one_rank(packed, 2)
    weights = [dict(local.named_parameters())[name] for name in packed_names(packed)]
    assert with_it.packed == sum(packed_bytes(weight.shape, Packing.nf4) for weight in weights)
    # Every rank had a fourth of the matrices; of the two ranks that share experts each had half of its own.
    dense = sum(weight.numel() for weight in weights if weight.ndim == 2)
    experts = sum(weight.numel() for weight in weights if weight.ndim == 3)
    assert without.parameters - with_it.parameters == pytest.approx(2 * (dense / 4 + experts / 2), rel=1e-3)
    assert without.gathered > with_it.gathered > 2 * max(weight.numel() for weight in weights)
    assert "packed" not in without.parts()
    assert with_it.total == sum(with_it.parts().values()) < without.total
