"""Averages of weights under FSDP2 and every ZeRO stage, against one plain process.

Bounds as in `test_fsdp2` and `test_deepspeed`: the order of sums differs, so bits cannot be equal.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.types import StepTotals
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.deepspeed import DeepSpeedEngine
from cantata.train.ema import AdamWithEMA
from cantata.train.engine import Engine
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from cantata.train.optim import optimizer_defaults, parameter_groups
from tests.distributed.mesh import mesh_of
from tests.distributed.spawn import run_ranks
from tests.distributed.standin import BALANCE, build_on_meta
from tests.distributed.test_deepspeed import small_parameters_partitioned, whole_state
from tests.distributed.test_fsdp2 import MICRO_BATCHES, RULES, SEED, TOTALS, share, whole

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
OPTIMIZER = partial(
    AdamWithEMA, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True, ema_decay=0.2
)
NEXT_TOKEN = NextToken(BALANCE)
STEPS = 3


def settings(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "mesh": mesh_of(MeshConfig(dp_replicate=1, dp_shard=-1, ep=1)),
        "source": RandomInit(model, SEED),
        "optimizer": OPTIMIZER,
        "parameters": RULES,
        "recompute": Recompute.none,
        "compile": False,
        "device": CPU,
        "offload": "none",
    }


def evaluated(model: torch.nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        loss = NEXT_TOKEN(model, MICRO_BATCHES[0], StepTotals(1, 1, 1.0)).sums["loss_sum"].item()
    model.train()
    return loss


def run(engine: Engine, state_of: Any) -> dict[str, Any]:
    """Averages after a few steps, held-out losses with and without them, and what the swap left behind."""
    with engine.averaged():
        start = evaluated(engine.model)
    # The order matters: what the plain evaluation leaves gathered must not serve the averaged one.
    assert start == evaluated(engine.model)
    batches = share()
    for _ in range(STEPS):
        for index, batch in enumerate(batches, start=1):
            engine.forward_backward(batch, NEXT_TOKEN, TOTALS, last=index == len(batches))
        engine.gradient_norm(None)
        engine.step(1.0)
    before = state_of(engine)
    plain = evaluated(engine.model)
    with engine.averaged():
        averaged = evaluated(engine.model)
        inside = state_of(engine)
    after = state_of(engine)
    return {
        "end": before,
        "losses": (start, plain, averaged, evaluated(engine.model)),
        "changed inside": not equal(inside, before),
        "as before": equal(after, before),
    }


def whole_fsdp2(engine: Any) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in engine.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fsdp2() -> dict[str, Any]:
    results = {}
    for name, options in {
        "fp32": {"precision": "fp32", "state_dtype": "fp32"},
        "bf16 states": {"precision": "bf16", "state_dtype": "bf16"},
        "offload": {"precision": "fp32", "state_dtype": "fp32", "offload": "parameters"},
    }.items():
        results[name] = run(FSDP2Engine(**(settings(build_on_meta()) | options)), whole_fsdp2)
    return results


def deepspeed() -> dict[str, Any]:
    results = {}
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            with small_parameters_partitioned():
                options = {"precision": precision, "zero_stage": stage}
                engine = DeepSpeedEngine(**(settings(build_on_meta()) | options))
            results[f"zero {stage} {precision}"] = run(engine, whole_state)
    return results


def reference() -> dict[str, Any]:
    model = build_on_meta()
    materialize(model, RandomInit(model, SEED), CPU)
    optimizer = OPTIMIZER(parameter_groups(model, RULES, *optimizer_defaults(OPTIMIZER)))
    start = evaluated(model)
    for _ in range(STEPS):
        for batch in MICRO_BATCHES:
            NEXT_TOKEN(model, batch, TOTALS).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = [start, evaluated(model)]
    averages = {n: optimizer.state[p]["ema"].clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in averages:
                parameter.copy_(averages[name])
    return {"averages": averages, "losses": [*losses, evaluated(model), losses[1]]}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return reference()


def check(results: dict[str, dict[str, Any]], expected: dict[str, Any]) -> None:
    for variant, found in results.items():
        assert found["as before"], variant
        assert found["changed inside"], variant
        # Three steps of rates up to 2e-2 move a weight by 6e-2; half of that would be a wrong direction.
        exact = "bf16" not in variant
        for name, average in expected["averages"].items():
            value = found["end"][f"optimizer.{name}.ema"]
            assert value.dtype == torch.float32
            assert (value - average).abs().max() <= (1e-6 if exact else 3e-2), (variant, name)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6 if exact else 2e-2), variant
        _, plain, averaged, again = found["losses"]
        assert plain == again != averaged


@pytest.mark.parametrize("world_size", [1, 2])
def test_fsdp2_averages_as_one_plain_process(world_size: int, expected: dict[str, Any]) -> None:
    check(run_ranks(fsdp2, world_size)[0], expected)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs cantata[deepspeed]")
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_averages_as_one_plain_process(world_size: int, expected: dict[str, Any]) -> None:
    check(run_ranks(deepspeed, world_size, timeout=600.0)[0], expected)
