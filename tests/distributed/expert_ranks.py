"""A small Aria on ranks that share its experts, and the same steps in one plain process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.dist import all_reduce_sum
from cantata.core.types import Batch, StepTotals
from cantata.nn.moe.balance import balance_loss, update_expert_bias
from cantata.parallel.materialize import Index, RandomInit, materialize
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.deepspeed import DeepSpeedEngine
from cantata.train.engine import Engine
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from cantata.train.optim import optimizer_defaults, parameter_groups
from tests.distributed.join import totals_of
from tests.distributed.mesh import mesh_of
from tests.distributed.test_deepspeed_aria import BALANCE, OPTIMIZER, build_aria, joint_loss, make_batch

STEPS, MICRO_STEPS, MAX_NORM, BIAS_RATE = 3, 2, 0.1, 1e-3
EP = MeshConfig(dp_replicate=1, dp_shard=-1, ep=2)
DENSE = MeshConfig(dp_replicate=1, dp_shard=-1, ep=1)


def micro_batches(world: int) -> list[list[Batch]]:
    """By micro-step, a batch of its own length for each rank; some ranks never have an image."""
    batches = [
        make_batch(seed, seed in (0, 6), tokens=17 + 3 * (seed % 3)) for seed in range(MICRO_STEPS * world)
    ]
    return [batches[start : start + world] for start in range(0, len(batches), world)]


def totals(world: int) -> StepTotals:
    batches = [batch for step in micro_batches(world) for batch in step]
    return totals_of(batches)


class Recorded:
    """A source that remembers which rows of every tensor were asked for."""

    def __init__(self, source: RandomInit, rows: dict[str, slice]) -> None:
        self.source = source
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def read(self, name: str, index: Index) -> Tensor:
        self.rows[name] = index[0] if index else slice(0, 1)
        return self.source.read(name, index)


def build(
    mesh: MeshConfig = EP, seed: int = 3, record: dict[str, slice] | None = None, **options: Any
) -> DeepSpeedEngine:
    model = build_aria()
    defaults: dict[str, Any] = {
        "parameters": {},
        "recompute": Recompute.none,
        "precision": "fp32",
        "offload": "none",
    }
    return DeepSpeedEngine(
        model=model,
        mesh=mesh_of(mesh),
        source=Recorded(RandomInit(model, seed), {} if record is None else record),
        optimizer=OPTIMIZER,
        device=torch.device("cpu"),
        compile=False,
        **(defaults | options),
    )


def build_fsdp2() -> FSDP2Engine:
    model = build_aria()
    return FSDP2Engine(
        model=model,
        mesh=mesh_of(EP),
        source=RandomInit(model, 99),
        optimizer=OPTIMIZER,
        parameters={},
        recompute=Recompute.none,
        compile=False,
        device=torch.device("cpu"),
        precision="fp32",
        state_dtype="fp32",
        offload="none",
    )


def one_step(engine: Engine, factor: float = 1.0) -> tuple[float, Tensor, Tensor]:
    """Norm, counts and Switch losses of a step over all ranks. `factor` scales the loss of the last rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    counts, aux = torch.zeros(()), torch.zeros(())
    for index, batches in enumerate(micro_batches(world), start=1):
        objective = NextToken(BALANCE)

        def scaled(model: Any, batch: Batch, totals: StepTotals, plain: Any = objective) -> Any:
            loss = plain(model, batch, totals)
            return loss._replace(value=loss.value * (factor if rank == world - 1 else 1.0))

        sums = engine.forward_backward(batches[rank], scaled, totals(world), last=index == MICRO_STEPS)
        counts, aux = counts + sums["tokens_per_expert_LME"], aux + sums["router/aux_loss_L"]
    counts, aux = all_reduce_sum(counts), all_reduce_sum(aux)
    norm = engine.gradient_norm(MAX_NORM)
    if math.isfinite(norm):
        engine.step(1.0)
        update_expert_bias(engine.model.moe_layers(), counts.sum(1), BIAS_RATE)  # type: ignore[operator]
    else:
        engine.skip()
    return norm, counts, aux


def reference(world: int, options: dict[str, Any]) -> dict[str, Any]:
    model = build_aria()
    materialize(model, RandomInit(model, 3), torch.device("cpu"))
    start = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    rules = options.get("parameters", {})
    optimizer = OPTIMIZER(parameter_groups(model, rules, *optimizer_defaults(OPTIMIZER)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms, counts, aux = [], [], []
    for _ in range(STEPS):
        step_counts, step_aux = torch.zeros(()), torch.zeros(())
        for batches in micro_batches(world):
            with torch.no_grad():
                stats = [model(batch).router for batch in batches]
            micro_counts = torch.stack([item.tokens_per_expert_ME for item in stats]).sum(0)
            step_counts = step_counts + micro_counts
            for item in stats:
                step_aux = step_aux + balance_loss(item, micro_counts, BALANCE).sums["aux_loss_L"]
            joint_loss(model, batches, totals(world)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        update_expert_bias(model.moe_layers(), step_counts.sum(1), BIAS_RATE)
        counts.append(step_counts)
        aux.append(step_aux)
    end = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {
        "start": start,
        "norms": norms,
        "counts": torch.stack(counts),
        "aux": torch.stack(aux),
        "end": end,
    }
