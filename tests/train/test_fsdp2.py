"""What the engine refuses, and its state. Numbers are compared in tests/distributed/test_fsdp2.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cantata.core.errors import ConfigError, RunError
from cantata.parallel import fsdp
from cantata.parallel.materialize import RandomInit
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.parallel.recompute import Recompute
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from cantata.train.optim import ParameterRule
from tests.distributed.join import totals_of
from tests.distributed.standin import BALANCE, build_on_meta, make_batch

BATCH = make_batch(20, 0)
TOTALS = totals_of([BATCH])


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build_engine(seed: int = 0, tied: bool = False, **changes: Any) -> FSDP2Engine:
    model = build_on_meta(tied)
    settings: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True),
        "parameters": {},
        "recompute": Recompute.none,
        "compile": False,
        "precision": "fp32",
        "state_dtype": "fp32",
        "offload": "none",
    }
    mesh = build_mesh(MeshConfig(1, -1, 1), 1, "cpu")
    source = RandomInit(model, seed)
    return FSDP2Engine(
        model=model, mesh=mesh, source=source, device=torch.device("cpu"), **(settings | changes)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "optimizer"}, r"engine\.offload=optimizer is not offered by fsdp2"),
        ({"offload": "parameter"}, r"engine\.offload=parameter is not one of .*nearest: parameters"),
        ({"precision": "fp16"}, r"engine\.precision=fp16 is not one of bf16, fp32"),
        ({"state_dtype": "bf16"}, r"engine\.state_dtype=bf16 needs engine\.precision=bf16"),
        ({"optimizer": partial(torch.optim.SGD, lr=1.0)}, "optimizer=SGD"),
        (
            {"parameters": {"block.*": ParameterRule(None, None, True)}},
            "matches no parameter; nearest: blocks",
        ),
    ],
)
def test_what_is_not_supported_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_engine(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizers_state_is_what_its_first_step_would_make(fused: bool) -> None:
    engine = build_engine(optimizer=partial(torch.optim.AdamW, lr=1e-2, fused=fused))
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    plain = torch.optim.AdamW([parameter], lr=1e-2, fused=fused)
    plain.step()
    wanted = {name: (value.dtype, value.device) for name, value in plain.state[parameter].items()}
    state = engine.state_dict()
    prefix = "optimizer.embedding.weight."
    made = {
        name.removeprefix(prefix): (value.dtype, value.device)
        for name, value in state.items()
        if name.startswith(prefix)
    }
    assert made == wanted
    assert all(not value.any() for name, value in state.items() if name.startswith(prefix))


def test_state_names_are_the_contracts() -> None:
    engine = build_engine(parameters={"embedding.*": ParameterRule(None, None, frozen=True)})
    names = set(engine.state_dict())
    assert "model.embedding.weight" in names
    assert "model.blocks.0.expert_bias_E" in names
    assert "model.blocks.0.scale_D" not in names
    assert not [name for name in names if name.startswith("optimizer.embedding")]
    assert {name.rpartition(".")[2] for name in names if name.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


def test_loading_replaces_what_an_evaluation_left_gathered() -> None:
    # Tied, the embedding belongs to the root, which stays gathered after a forward without backward.
    engine, other = (build_engine(seed=seed, tied=True, precision="bf16") for seed in (0, 1))
    with torch.no_grad():
        before = engine.model(BATCH).loss_sum
        wanted = other.model(BATCH).loss_sum
        engine.load_state_dict(other.state_dict())
        after = engine.model(BATCH).loss_sum
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)


def test_state_is_whole_after_an_evaluation() -> None:
    engine = build_engine(precision="bf16")
    with torch.no_grad():
        engine.model(BATCH)
    engine.forward_backward(BATCH, NextToken(BALANCE), TOTALS, last=True)
    engine.gradient_norm(None)
    engine.step(1.0)
    with torch.no_grad():
        engine.model(BATCH)
    kinds = {type(value).__name__ for name, value in engine.state_dict().items() if name.endswith(".weight")}
    assert kinds == {"DTensor"}


@pytest.mark.parametrize("tied", [False, True])
def test_one_rank_learns_the_same_without_shards(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_engine(tied=tied)
    monkeypatch.setattr(fsdp, "_computes_as_kept", lambda model, sharding: False)
    sharded = build_engine(tied=tied)
    for _ in range(3):
        for engine in (whole, sharded):
            engine.forward_backward(BATCH, NextToken(BALANCE), TOTALS, last=False)
            engine.forward_backward(BATCH, NextToken(BALANCE), TOTALS, last=True)
        assert whole.gradient_norm(0.1) == sharded.gradient_norm(0.1)
        whole.step(1.0)
        sharded.step(1.0)
    states = whole.state_dict(), sharded.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert not isinstance(value, DTensor)
        held = states[1][name]
        assert torch.equal(value, held.full_tensor() if isinstance(held, DTensor) else held), name


def test_a_foreign_state_is_refused() -> None:
    engine = build_engine()
    state = engine.state_dict()
    del state["model.logit_scale"]
    with pytest.raises(RunError, match=r"first model\.logit_scale"):
        engine.load_state_dict(state)


def test_skip_forgets_the_gradients() -> None:
    engine = build_engine(precision="bf16")
    before = {name: value.full_tensor().clone() for name, value in engine.model.named_parameters()}
    engine.forward_backward(BATCH, NextToken(BALANCE), TOTALS, last=True)
    engine.skip()
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in engine.model.named_parameters())
