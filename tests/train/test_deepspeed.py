"""What the DeepSpeed engine refuses, and the parts of it that need no process group."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.train.deepspeed import validate
from cantata.train.deepspeed_setup import allocate, import_deepspeed, settings
from cantata.train.deepspeed_state import start_adam
from cantata.train.deepspeed_zero import Fragment
from cantata.train.options import Offload, Precision

CPU = torch.device("cpu")


def mesh(dp_replicate: int) -> Any:
    return {"dp_replicate": SimpleNamespace(size=lambda: dp_replicate)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, r"engine\.zero_stage=4 must be 0, 1, 2 or 3"),
        (
            {"offload": Offload.parameters, "zero_stage": 2},
            r"engine\.offload=parameters needs .*zero_stage=3",
        ),
        (
            {"offload": Offload.optimizer, "zero_stage": 0},
            r"engine\.offload=optimizer needs .*zero_stage=1, 2",
        ),
        ({"mesh": mesh(2)}, r"mesh\.dp_replicate=2 is not offered by deepspeed"),
        ({"compile": True, "zero_stage": 3}, r"train\.compile=true is not offered with engine\.zero_stage=3"),
    ],
)
def test_what_it_cannot_do_names_the_option(options: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {"mesh": mesh(1), "offload": Offload.none, "zero_stage": 2, "compile": False}
    validate(**fine)
    with pytest.raises(ConfigError, match=message):
        validate(**(fine | options))


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


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2), (1,), (9, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_fragment_reads_its_own_rows_only(shape: tuple[int, ...], world_size: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    size = -(-whole.numel() // world_size)
    for start in range(0, whole.numel(), size):
        fragment = Fragment(torch.empty(0), 0, start, min(size, whole.numel() - start))
        rows, within = fragment.rows(shape)
        part = whole[rows]
        assert torch.equal(part.reshape(-1)[within], fragment.within(whole))
        width = whole[0].numel()
        assert part.numel() < fragment.numel + 2 * width, "rows that the fragment does not touch"


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


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}, {"amsgrad": True}])
def test_adams_first_state_is_what_its_first_step_makes(options: dict[str, Any]) -> None:
    ready, lazy = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs = torch.optim.AdamW([ready], **options), torch.optim.AdamW([lazy], **options)
    moments = start_adam(ours, [ready])
    assert {float(value.abs().max()) for value in ours.state[ready].values()} == {0.0}
    for parameter, optimizer in ((ready, ours), (lazy, theirs)):
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    assert torch.equal(ready, lazy)
    assert ours.state[ready].keys() == theirs.state[lazy].keys() == {*moments, "step"}
    for name, value in theirs.state[lazy].items():
        assert torch.equal(ours.state[ready][name], value)
        assert ours.state[ready][name].dtype == value.dtype


def test_other_optimizers_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match="SGD: deepspeed supports"):
        start_adam(torch.optim.SGD([parameter], lr=0.1), [parameter])
