"""FSDP2 on gloo ranks against one plain process.

Bounds: fp32 at 1e-6, absolute, on values of order 0.1 to 1. The order of sums over ranks and
micro-batches differs, so bits cannot be equal; an eps of 1e-5 keeps AdamW from magnifying the rounding of
gradients that are nearly zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cantata.core.types import Batch
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from cantata.train.optim import ParameterRule, optimizer_defaults, parameter_groups
from tests.distributed.join import totals_of
from tests.distributed.mesh import mesh_of
from tests.distributed.spawn import run_ranks
from tests.distributed.standin import BALANCE, build_on_meta, make_batch

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
SEED = 5
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)
RULES = {
    "embedding.*": ParameterRule(learning_rate=2e-2, weight_decay=0.0, frozen=False),
    "blocks.0.mix.*": ParameterRule(learning_rate=None, weight_decay=None, frozen=True),
    "blocks.1.mix.bias": ParameterRule(learning_rate=None, weight_decay=None, frozen=True),
}
MAX_NORM = 0.05
MICRO_BATCHES = [make_batch(tokens, seed) for seed, tokens in enumerate((24, 17, 31, 8))]
TOTALS = totals_of(MICRO_BATCHES)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build_engine(mesh: MeshConfig, **options: Any) -> FSDP2Engine:
    model = build_on_meta(options.pop("tied", False))
    settings: dict[str, Any] = {
        "parameters": RULES,
        "recompute": Recompute.none,
        "compile": False,
        "precision": "fp32",
        "state_dtype": "fp32",
        "offload": "none",
    }
    return FSDP2Engine(
        model=model,
        mesh=mesh_of(mesh),
        source=RandomInit(model, SEED),
        optimizer=OPTIMIZER,
        device=CPU,
        **(settings | options),
    )


def two_steps(engine: FSDP2Engine, batches: list[Batch]) -> dict[str, Any]:
    """Everything that must not depend on the layout: start, gradients, norms, counts, end."""
    start = {name: whole(value) for name, value in engine.state_dict().items()}
    norms, counts, gradients = [], [], {}
    for _ in range(2):
        for index, batch in enumerate(batches, start=1):
            sums = engine.forward_backward(batch, NextToken(BALANCE), TOTALS, last=index == len(batches))
            counts.append(sums["tokens_per_expert_LME"])
        gradients = {name: whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}
        norms.append(engine.gradient_norm(MAX_NORM))
        engine.step(0.5)
    total = torch.stack(counts).sum(0)
    dist.all_reduce(total)
    end = {name: whole(value) for name, value in engine.state_dict().items()}
    return {"start": start, "gradients": gradients, "norms": norms, "counts": total, "end": end}


def share() -> list[Batch]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return MICRO_BATCHES[rank::world_size]


def variants() -> dict[str, dict[str, Any]]:
    """Every engine variant on this world; one process group serves all of them."""
    world = MeshConfig(dp_replicate=1, dp_shard=-1, ep=1)
    results = {
        "plain": two_steps(build_engine(world), share()),
        "tied": two_steps(build_engine(world, tied=True), share()),
        "selective": two_steps(build_engine(world, recompute=Recompute.selective), share()),
        "full": two_steps(build_engine(world, recompute=Recompute.full), share()),
        "offload": two_steps(build_engine(world, offload="parameters"), share()),
        "bf16": two_steps(build_engine(world, precision="bf16"), share()),
        "bf16 states": two_steps(build_engine(world, precision="bf16", state_dtype="bf16"), share()),
    }
    if dist.get_world_size() > 1:
        replicated = MeshConfig(dp_replicate=2, dp_shard=-1, ep=1)
        results["hybrid"] = two_steps(build_engine(replicated), share())
    return results


def reference(tied: bool = False) -> dict[str, Any]:
    """The same two steps in plain torch: one process, one big sum, no engine."""
    model = build_on_meta(tied)
    materialize(model, RandomInit(model, SEED), CPU)
    groups = parameter_groups(model, RULES, *optimizer_defaults(OPTIMIZER))
    for group in groups:
        group["lr"] *= 0.5
    optimizer = OPTIMIZER(groups)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {f"model.{name}": p.detach().clone() for name, p in persistent_tensors(model)}
    norms, gradients, counts = [], {}, torch.zeros(2, 3, 5, dtype=torch.int64)
    for _ in range(2):
        for batch in MICRO_BATCHES:
            loss = NextToken(BALANCE)(model, batch, TOTALS)
            loss.value.backward()
            counts += loss.sums["tokens_per_expert_LME"]
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    end = {f"model.{name}": value.detach().clone() for name, value in persistent_tensors(model)}
    for name, p in trained.items():
        for key, value in optimizer.state[p].items():
            end[f"optimizer.{name}.{key}"] = value
    return {"start": start, "gradients": gradients, "norms": norms, "counts": counts, "end": end}


@pytest.fixture(scope="module")
def expected() -> dict[bool, dict[str, Any]]:
    return {tied: reference(tied) for tied in (False, True)}


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return run_ranks(variants, request.param)[0]


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() >= wanted.keys()
    for name, value in wanted.items():
        worst = (actual[name].float() - value.float()).abs().max().item()
        assert worst <= bound, f"{name} differs by {worst:.2e}"


def test_two_steps_equal_one_plain_process(results: Any, expected: Any) -> None:
    for variant, run in results.items():
        if variant.startswith("bf16"):
            continue
        wanted = expected[variant == "tied"]
        assert_same(run["start"], wanted["start"], 0.0)
        assert run["gradients"].keys() == wanted["gradients"].keys()
        assert_same(run["gradients"], wanted["gradients"], 1e-6)
        assert run["norms"] == pytest.approx(wanted["norms"], rel=1e-6)
        assert min(run["norms"]) > MAX_NORM, "nothing would be clipped"
        assert run["end"].keys() == wanted["end"].keys()
        assert_same(run["end"], wanted["end"], 1e-6)


def test_recompute_changes_no_bit_and_counts_once(results: Any, expected: Any) -> None:
    for mode in ("selective", "full"):
        assert_same(results[mode]["end"], results["plain"]["end"], 0.0)
        assert results[mode]["norms"] == results["plain"]["norms"]
        assert torch.equal(results[mode]["counts"], expected[False]["counts"])


def test_bf16_follows_fp32(results: Any, expected: Any) -> None:
    """Bound: two steps of rate 1e-2 move a weight by 2e-2; half of that would be a wrong direction."""
    for variant in ("bf16", "bf16 states"):
        run = results[variant]
        assert run["norms"] == pytest.approx(expected[False]["norms"], rel=0.05)
        weights = {name: value for name, value in expected[False]["end"].items() if name.startswith("model.")}
        assert_same(run["end"], weights, 1.5e-2)
    dtypes = {
        variant: {value.dtype for name, value in results[variant]["end"].items() if "exp_avg" in name}
        for variant in ("bf16", "bf16 states")
    }
    assert dtypes == {"bf16": {torch.float32}, "bf16 states": {torch.bfloat16}}
    assert results["bf16 states"]["end"]["model.blocks.0.expert_bias_E"].dtype == torch.float32


def test_frozen_parameters_stay_and_have_no_state(results: Any) -> None:
    for run in results.values():
        name = "blocks.0.mix.weight"
        assert torch.equal(run["start"][f"model.{name}"], run["end"][f"model.{name}"])
        assert f"optimizer.{name}.exp_avg" not in run["end"]
