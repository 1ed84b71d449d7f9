"""A tokenizer and its critic on two ranks against one plain process, under FSDP2 and ZeRO.

Bounds: fp32 at 1e-6, absolute, on values of order 0.1 to 1, after three steps; the order of sums differs, and
an eps of 1e-5 keeps AdamW from magnifying the rounding of gradients that are nearly zero.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import PixelBatch
from cantata.parallel.materialize import RandomInit, materialize
from cantata.train.adversarial import Adversarial
from cantata.train.critic import Critic, CriticConfig, WithCritic
from cantata.train.engine import Engine
from cantata.train.metrics import StepSums
from cantata.train.optim import optimizer_defaults, parameter_groups
from cantata.train.reconstruction import LossConfig, Reconstruction
from tests.distributed.engines import CPU, build_engine, saved
from tests.distributed.spawn import run_ranks
from tests.train.pixels import Tokenizer, images, joined, totals_of
from tests.train.test_critic import CONFIG

pytestmark = pytest.mark.distributed

SEED, STEPS = 5, 3
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)
LOSS = LossConfig(l1=1.0, l2=0.5, perceptual=0.0)
ADAPTIVE = replace(CONFIG, start_discriminator=0, start_generator=1, clip_grad_norm=0.05)
FIXED = replace(ADAPTIVE, adaptive=False, loss=Adversarial.non_saturating)
# Ranks of unlike size, so that a mean of means would be seen.
STEP = [images(3, seed=1, side=16), images(1, seed=2, side=16)]
TOTALS = totals_of(STEP)


def on_meta() -> Tokenizer:
    with torch.device("meta"):
        return Tokenizer()


def objective_of(critic: Critic, model: Tokenizer) -> Reconstruction:
    return Reconstruction(LOSS, None, critic, model.last_layer, None)


def three_steps(engine: Engine, objective: Reconstruction, batches: list[PixelBatch]) -> dict[str, Tensor]:
    """The step's sums, reduced, of the last step."""
    reduced: dict[str, Tensor] = {}
    for _ in range(STEPS):
        sums = StepSums()
        for index, batch in enumerate(batches, start=1):
            sums.add(engine.forward_backward(batch, objective, TOTALS, last=index == len(batches)))
        engine.gradient_norm(0.5)
        engine.step(1.0)
        reduced = sums.reduced()
    return reduced


def train(config: CriticConfig, engine: str) -> dict[str, Any]:
    """Two ranks with a micro-batch each; returns whole tensors and what each rank's critic became."""
    model = on_meta()
    inner = build_engine(engine, model, SEED, OPTIMIZER)
    critic = Critic(config, SEED, STEPS, CPU)
    names = critic.state_dict().keys()
    whole_engine = WithCritic(inner, critic)
    sums = three_steps(whole_engine, objective_of(critic, model), STEP[dist.get_rank() :: 2])
    state = saved(whole_engine)
    assert names <= state.keys()
    return {"state": state, "sums": sums}


def reference(config: CriticConfig, batches: list[PixelBatch]) -> dict[str, Any]:
    """One process, in plain torch."""
    model = on_meta()
    materialize(model, RandomInit(model, SEED), CPU)
    optimizer = OPTIMIZER(parameter_groups(model, {}, *optimizer_defaults(OPTIMIZER)))
    critic = Critic(config, SEED, STEPS, CPU)
    objective, sums = objective_of(critic, model), StepSums()
    for _ in range(STEPS):
        sums = StepSums()
        for batch in batches:
            loss = objective(model, batch, TOTALS)
            loss.value.backward()
            sums.add(loss.sums)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        critic.reduce()
        optimizer.step()
        optimizer.zero_grad()
        critic.step()
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()} | critic.state_dict()
    return {"state": state, "sums": sums.reduced()}


def check(ranks: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    # Of a ZeRO engine every rank holds a part of the names.
    state = {name: value for rank in ranks for name, value in rank["state"].items()}
    for name, value in wanted["state"].items():
        difference = (state[name].double() - value.double()).abs().max().item()
        assert difference <= 1e-6, f"{name} differs by {difference:.1e}"
    for name, value in ranks[0]["state"].items():
        if name.startswith("critic."):
            assert torch.equal(value, ranks[1]["state"][name]), f"{name} differs between ranks"
    assert ranks[0]["sums"].keys() == wanted["sums"].keys()
    for name, value in wanted["sums"].items():
        torch.testing.assert_close(ranks[0]["sums"][name], value, rtol=1e-5, atol=1e-4, msg=name)
    assert ranks[0]["sums"]["parts/adversarial"] != 0
    assert ranks[0]["sums"]["parts/lecam"] != 0


def both(engines: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {f"{e} {n}": train(c, e) for e in engines for n, c in (("adaptive", ADAPTIVE), ("fixed", FIXED))}


@pytest.mark.parametrize(
    "engines",
    [
        ("fsdp2",),
        pytest.param(
            ("zero 0", "zero 2", "zero 3"),
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs cantata[deepspeed]"),
            ],
        ),
    ],
)
def test_two_ranks_equal_one_process(engines: tuple[str, ...]) -> None:
    ranks = run_ranks(both, 2, engines, timeout=400.0)
    # The adaptive weight is that of a micro-batch over all ranks; without it the split does not matter.
    wanted = {"adaptive": reference(ADAPTIVE, [joined(STEP)]), "fixed": reference(FIXED, STEP)}
    for engine in engines:
        for name, of_one in wanted.items():
            check([rank[f"{engine} {name}"] for rank in ranks], of_one)
