"""A tokenizer with its quantiser and critic on two ranks against one plain process, under FSDP2 and ZeRO-2.

Bound: fp32 at 1e-6 of a tensor's largest value, or of 0.1, the order of most weights, after three steps of
AdamW. The order of sums differs, and an eps of 1e-3 keeps AdamW from magnifying the rounding of gradients
that are nearly zero: with 1e-5, weights that start 1e-7 apart end 1e-4 apart in one process too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import StepTotals
from cantata.models.autoencoder import Autoencoder, AutoencoderConfig
from cantata.nn.quantize import EMAVectorQuantizer, VectorQuantizer
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors
from cantata.train.critic import Critic, WithCritic
from cantata.train.listeners import Codebook
from cantata.train.loop import Progress, StepResult
from cantata.train.metrics import StepSums
from cantata.train.optim import optimizer_defaults, parameter_groups
from cantata.train.reconstruction import PARTS, USAGE, LossConfig, Reconstruction
from tests.distributed.engines import CPU, build_engine, saved
from tests.distributed.spawn import run_ranks
from tests.train.pixels import images
from tests.train.test_critic import CONFIG

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEED, STEPS, BOUND = 5, 3, 1e-6
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, fused=True)
SHAPE = AutoencoderConfig(
    encoder_channels=8,
    decoder_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    decoder_res_blocks=2,
    middle=True,
    direct_resampling=False,
    attention_levels=(1,),
    patch_size=2,
    z_channels=8,
)
LOSS = LossConfig(l1=1.0, l2=0.5, perceptual=0.0)
CRITIC = replace(
    CONFIG,
    start_discriminator=0,
    start_generator=1,
    adaptive=False,
    optimizer=CONFIG.optimizer | {"lr": 1e-3, "eps": 1e-3},
)
# Ranks of unlike size, so that a mean of means would be seen; codes of an image: 4 x 4.
STEP = [replace(images(count, seed=count, side=16), codes_per_image=16) for count in (3, 1)]
TOTALS = StepTotals(
    *(sum(getattr(batch, name) for batch in STEP) for name in ("num_tokens", "num_targets", "target_weight"))
)
QUANTIZERS = {
    "ema": partial(EMAVectorQuantizer, 16, 4, commitment=0.25, decay=0.9, eps=1e-5, reset_below=0.3),
    "vq": partial(VectorQuantizer, 16, 4, commitment=0.25, l2_normalize=False, gradient="straight_through"),
}
CASES = [("fsdp2", quantizer, critic) for quantizer in QUANTIZERS for critic in (False, True)]
if find_spec("deepspeed") is not None:
    CASES += [("zero 2", "ema", False), ("zero 2", "vq", True)]


def on_meta(quantizer: str) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(SHAPE, QUANTIZERS[quantizer]())


def learn(codebook: Codebook, sums: dict[str, Tensor], step: int) -> None:
    codebook.after_step(StepResult(Progress(step=step), TOTALS, sums, 0.0, 1.0, 0.0, 0.0))


def train(name: str, quantizer: str, has_critic: bool) -> dict[str, Any]:
    """Two ranks with a micro-batch each: the sums of each step, and the tensors that this rank saves."""
    model = on_meta(quantizer)
    engine = build_engine(name, model, SEED, OPTIMIZER)
    critic = Critic(CRITIC, SEED, STEPS, CPU) if has_critic else None
    if critic is not None:
        engine = WithCritic(engine, critic)
    objective = Reconstruction(LOSS, None, critic, model.last_layer, None)
    codebook, told = Codebook(model.quantizer), []
    for step in range(1, STEPS + 1):
        sums = StepSums()
        sums.add(engine.forward_backward(STEP[dist.get_rank()], objective, TOTALS, last=True))
        engine.gradient_norm(0.5)
        reduced = sums.reduced()
        engine.step(1.0)
        learn(codebook, reduced, step)
        told.append(reduced)
    return {"state": saved(engine), "sums": told}


def in_bf16(quantizer: str) -> dict[str, Any]:
    """One step of FSDP2 that computes in bf16."""
    model = on_meta(quantizer)
    engine = build_engine("fsdp2", model, SEED, OPTIMIZER, precision="bf16")
    objective, sums = Reconstruction(LOSS, None, None, model.last_layer, None), StepSums()
    seen: list[torch.dtype] = []
    model.quantizer.register_forward_hook(lambda *_: seen.append(model.quantizer.codebook_KD.dtype))
    sums.add(engine.forward_backward(STEP[dist.get_rank()], objective, TOTALS, last=True))
    norm, reduced = engine.gradient_norm(0.5), sums.reduced()
    engine.step(1.0)
    learn(Codebook(model.quantizer), reduced, 1)
    finite = all(torch.isfinite(value).all() for value in engine.state_dict().values())
    return {"dtypes": seen, "norm": norm, "finite": bool(finite), "loss": reduced["loss_sum"].item()}


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {str(case): train(*case) for case in CASES}
    return found | {f"bf16 {quantizer}": in_bf16(quantizer) for quantizer in QUANTIZERS}


def reference(quantizer: str, has_critic: bool) -> dict[str, Any]:
    """One process, in plain torch, that takes the ranks' micro-batches one after the other."""
    model = on_meta(quantizer)
    materialize(model, RandomInit(model, SEED), CPU)
    optimizer = OPTIMIZER(parameter_groups(model, {}, *optimizer_defaults(OPTIMIZER)))
    critic = Critic(CRITIC, SEED, STEPS, CPU) if has_critic else None
    objective, told = Reconstruction(LOSS, None, critic, model.last_layer, None), []
    codebook = Codebook(model.quantizer)
    for step in range(1, STEPS + 1):
        sums = StepSums()
        for batch in STEP:
            loss = objective(model, batch, TOTALS)
            loss.value.backward()
            sums.add(loss.sums)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if critic is not None:
            critic.reduce()
            critic.step()
        reduced = sums.reduced()
        learn(codebook, reduced, step)
        told.append(reduced)
    state = {f"model.{name}": value.detach() for name, value in persistent_tensors(model)}
    return {"state": state | ({} if critic is None else critic.state_dict()), "sums": told}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each rank found, all in one start of the processes."""
    return run_ranks(everything, 2, timeout=400.0)


def assert_near(found: Tensor, wanted: Tensor, name: str, scale: float) -> None:
    difference = (found.double() - wanted.double()).abs().max().item()
    largest = max(wanted.double().abs().max().item(), scale)
    assert difference <= BOUND * largest, f"{name}: {difference:.1e} of {largest:.1e}"


@pytest.mark.parametrize(("engine", "quantizer", "has_critic"), CASES)
def test_two_ranks_equal_one_process(
    ranks: list[dict[str, Any]], engine: str, quantizer: str, has_critic: bool
) -> None:
    wanted = reference(quantizer, has_critic)
    found = [rank[str((engine, quantizer, has_critic))] for rank in ranks]
    for step, sums in enumerate(wanted["sums"]):
        for one in found:
            assert one["sums"][step].keys() == sums.keys()
            assert torch.equal(one["sums"][step][USAGE], sums[USAGE]), f"codes of step {step + 1}"
            for name, value in sums.items():
                # Sums over all values; what is summed may be small beside the values, of order 1.
                scale = TOTALS.target_weight if name.startswith(("loss_sum", PARTS)) else 0.1
                assert_near(one["sums"][step][name], value, f"{name} of step {step + 1}", scale)
    # Of a ZeRO engine every rank holds a part of the names.
    state = {name: value for one in found for name, value in one["state"].items()}
    for name, value in wanted["state"].items():
        assert_near(state[name], value, name, 0.1)
    assert wanted["state"]["model.quantizer.codebook_KD"].std() > 0


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_step_in_bf16_keeps_the_codebook_in_fp32(ranks: list[dict[str, Any]], quantizer: str) -> None:
    for rank in ranks:
        found = rank[f"bf16 {quantizer}"]
        assert found["dtypes"] == [torch.float32]
        assert found["finite"]
        assert math.isfinite(found["norm"])
        assert math.isfinite(found["loss"])
