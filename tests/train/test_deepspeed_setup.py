"""Before DeepSpeed starts: its settings, and a model with storage."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.train.deepspeed_setup import _follow_input, allocate, import_deepspeed, settings
from cantata.train.options import Offload, Precision

CPU = torch.device("cpu")


def test_without_deepspeed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install cantata\[deepspeed\]"):
        import_deepspeed(CPU)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", Precision)
def test_gradients_are_reduced_and_accumulated_in_fp32(stage: int, precision: Precision) -> None:
    config = settings(stage, precision, Offload.none, CPU)
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert ("gradient_allreduce_op" in config) == (stage < 3), "stage 3 can only average"
    assert config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("offload", "optimizer", "parameters"),
    [(Offload.none, False, False), (Offload.optimizer, True, False), (Offload.parameters, True, True)],
)
def test_parameters_never_leave_the_device_without_their_optimizer(
    offload: Offload, optimizer: bool, parameters: bool
) -> None:
    zero = settings(3, Precision.bf16, offload, CPU)["zero_optimization"]
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (optimizer, parameters)
    # Pinning memory needs a device to pin it for.
    assert not any(place["pin_memory"] for place in zero.values() if isinstance(place, dict))


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, True), (2, True), (3, True)])
def test_stage_0_keeps_its_own_masters(stage: int, bf16: bool) -> None:
    assert ("bf16" in settings(stage, Precision.bf16, Offload.none, CPU)) == bf16
    assert "bf16" not in settings(stage, Precision.fp32, Offload.none, CPU)


def test_allocate_keeps_shared_parameters_shared_and_buffers_as_they_are() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    before = dict(model.named_parameters())
    made: dict[nn.Parameter, nn.Parameter] = {}
    allocate(model["a"], torch.bfloat16, CPU, made)
    allocate(model, torch.bfloat16, CPU, made)
    assert model["a"].weight is model["b"].weight
    assert {made[old] for old in before.values()} == set(model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model["a"].bias.requires_grad
    assert model["a"].weight.requires_grad
    assert model["norm"].running_mean.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_block_behind_frozen_ones_still_gets_a_gradient_to_wait_for() -> None:
    block, frozen = nn.Linear(2, 2), torch.ones(3, 2)
    block.register_forward_pre_hook(_follow_input)
    seen: list[Any] = []
    block.register_full_backward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    block(frozen).sum().backward()
    assert seen[0].shape == frozen.shape
    assert not frozen.requires_grad
    before = torch.ones(3, 2, requires_grad=True)
    block(before).sum().backward()
    assert before.grad is not None, "an input that carries a gradient is not cut off"
    with torch.no_grad():
        assert not block(frozen).requires_grad
