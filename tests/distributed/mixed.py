"""Two ranks of which one sees other media than its neighbour, against one process that sees both.

The samples are those of `tests.models.aria.mixed`, through the real processor and collator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import Batch, StepTotals
from cantata.models.aria import Aria
from cantata.parallel.materialize import RandomInit, materialize
from cantata.train.engine import Engine
from cantata.train.objectives import NextToken
from cantata.train.optim import optimizer_defaults, parameter_groups
from tests.distributed.join import join, totals_of
from tests.models.aria.mixed import encoded, mixed_batch, mixed_layout
from tests.nn.moe.small import balance

BALANCE = balance(4, aux=1e-2, z=1e-3, bias=1e-3)
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2, eps=1e-5, weight_decay=0.1, fused=True)
MAX_NORM = 0.1
SEED = 3

CASES: dict[str, list[tuple[str, str]]] = {
    "several images | text": [("several images", "text")],
    "text | video": [("text", "video")],
    "crops, text | text, weighted chat": [("crops", "text"), ("text", "weighted chat")],
}
"""What rank 0 and rank 1 see in each micro-batch of a step."""


def build() -> Aria:
    with torch.device("meta"):
        return Aria(*mixed_layout(moe={"balance": BALANCE}))


@cache
def micro_batches(case: str) -> list[tuple[Batch, Batch]]:
    return [(mixed_batch(encoded(a)), mixed_batch(encoded(b), padding=3)) for a, b in CASES[case]]


def totals_of_step(case: str) -> StepTotals:
    return totals_of([batch for pair in micro_batches(case) for batch in pair])


def on_ranks(
    engine_of: Callable[[Aria], Engine], whole: Callable[[Engine], dict[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Norms of two steps and weights after them, of every case; `whole` is all of an engine's state."""
    found = {}
    for case in CASES:
        engine, norms = engine_of(build()), []
        batches = [pair[dist.get_rank()] for pair in micro_batches(case)]
        for _ in range(2):
            for index, batch in enumerate(batches, start=1):
                last = index == len(batches)
                engine.forward_backward(batch, NextToken(BALANCE), totals_of_step(case), last=last)
            norms.append(engine.gradient_norm(MAX_NORM))
            engine.step(1.0)
        weights = {name: value for name, value in whole(engine).items() if name.startswith("model.")}
        found[case] = {"norms": norms, "end": weights}
    return found


def on_one(case: str) -> dict[str, Any]:
    """The same in plain torch, on one process."""
    model = build()
    materialize(model, RandomInit(model, SEED), torch.device("cpu"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, norms = OPTIMIZER(parameter_groups(model, {}, *optimizer_defaults(OPTIMIZER))), []
    for _ in range(2):
        for pair in micro_batches(case):
            NextToken(BALANCE)(model, join(pair), totals_of_step(case)).value.backward()
        # In fp64, as the engines: torch's fp32 sum over a whole embedding is off by 3e-6.
        norm = torch.stack([p.grad.double().norm() for p in trained if p.grad is not None]).norm()
        torch.nn.utils.clip_grads_with_norm_(trained, MAX_NORM, norm)
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "end": {f"model.{name}": value for name, value in model.state_dict().items()}}


def assert_equals_one(run: dict[str, Any], case: str) -> None:
    """The norms at 1e-6, relative; the weights, of order 0.1, at 1e-6, absolute."""
    wanted = on_one(case)
    assert min(wanted["norms"]) > MAX_NORM, "nothing would be clipped"
    assert run["norms"] == pytest.approx(wanted["norms"], rel=1e-6)
    assert run["end"].keys() == wanted["end"].keys()
    for name, value in wanted["end"].items():
        assert float((run["end"][name] - value).abs().max()) <= 1e-6, name
