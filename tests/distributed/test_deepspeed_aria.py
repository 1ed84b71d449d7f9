"""Aria under ZeRO, on ranks of which one has no image, against one plain process.

The bound is absolute, on weights of order 0.1: the order of sums over ranks and micro-batches differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import IMAGE, TEXT, Batch, Images, Segments, StepTotals
from cantata.models.aria import Aria
from cantata.models.aria.config import AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.models.aria.vision import patch_position_ids
from cantata.nn.moe.balance import balance_loss
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.deepspeed import DeepSpeedEngine
from cantata.train.objectives import NextToken
from cantata.train.optim import ParameterRule, optimizer_defaults, parameter_groups
from tests.distributed import mixed
from tests.distributed.join import totals_of
from tests.distributed.mesh import mesh_of
from tests.distributed.spawn import run_ranks
from tests.distributed.test_deepspeed import small_parameters_partitioned, whole_state
from tests.nn.moe.small import balance

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs cantata[deepspeed]"),
]

BOUND = 1e-6
BALANCE = balance(4, aux=1e-2, z=1e-3, bias=1e-3)
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2, eps=1e-5, weight_decay=0.1, fused=True)
FROZEN = ParameterRule(learning_rate=None, weight_decay=None, frozen=True)
# Nothing before the first decoder block has a gradient, and nothing before the second vision block.
BEHIND_FROZEN = {"vision.*": FROZEN, "projector.*": FROZEN, "text.embed_tokens.*": FROZEN}
VISION_BEHIND_FROZEN = {"vision.embeddings.*": FROZEN, "vision.layers.0.*": FROZEN}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero 1": {"zero_stage": 1},
    "zero 2 full": {"zero_stage": 2, "recompute": Recompute.full},
    "zero 3": {"zero_stage": 3},
    "zero 3 full": {"zero_stage": 3, "recompute": Recompute.full},
    "zero 3 selective": {"zero_stage": 3, "recompute": Recompute.selective},
    "zero 3 tied": {"zero_stage": 3, "tied": True},
    "zero 3 behind frozen": {"zero_stage": 3, "parameters": BEHIND_FROZEN},
    "zero 3 vision behind frozen": {"zero_stage": 3, "parameters": VISION_BEHIND_FROZEN},
    "zero 3 behind frozen, full": {
        "zero_stage": 3,
        "parameters": BEHIND_FROZEN,
        "recompute": Recompute.full,
    },
}
MIXED_STAGES = (2, 3)


def build_aria(tied: bool = False) -> Aria:
    moe = AriaMoEConfig(
        num_experts=4,
        top_k=2,
        num_shared_experts=1,
        expert_intermediate_size=8,
        num_groups=1,
        top_groups=1,
        balance=BALANCE,
    )
    vision = AriaVisionConfig(16, 32, 2, 2, 32, 8, 3, 1e-6, 0.2)
    text = AriaTextConfig(32, 16, 2, 4, 2, 4, 1e4, 1e-6, 128, tied, 0.2, 0, 1, 2, moe)
    with torch.device("meta"):
        return Aria(vision, AriaProjectorConfig({16: 4}, 0.2), text, image_token_id=9)


def make_batch(seed: int, with_image: bool, tokens: int = 20) -> Batch:
    """A sample, with one image of 2 x 3 patches and 4 features or without, and three padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(10, 32, (tokens,), generator=generator)
    labels_T = torch.randint(10, 32, (tokens,), generator=generator)
    labels_T[:6] = labels_T[-3:] = -100
    index_N = (labels_T != -100).nonzero()[:, 0]
    modality_T = torch.full((tokens,), TEXT)
    patches, features, token_index_Q = Segments(()), Segments(()), torch.empty(0, dtype=torch.int64)
    pixels_PC, positions_P = torch.empty(0, 192, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    if with_image:
        patches, features, token_index_Q = Segments((6,)), Segments((4,)), torch.arange(1, 5)
        pixels_PC = torch.randint(0, 256, (6, 192), dtype=torch.uint8, generator=generator)
        positions_P = patch_position_ids(2, 3, 4)
        ids_T[1:5], modality_T[1:5] = 9, IMAGE
    modality_T[-3:] = -1
    return Batch(
        input_ids_T=ids_T,
        labels_T=labels_T,
        position_ids_T=torch.arange(tokens),
        modality_ids_T=modality_T,
        target_index_N=index_N,
        target_modality_N=torch.full_like(index_N, IMAGE if with_image else TEXT),
        samples=Segments((tokens - 3,)),
        images=Images(pixels_PC, positions_P, patches, features, token_index_Q),
    )


# Rank 0 takes the even ones: it has images in one micro-batch, rank 1 in none.
MICRO_BATCHES = [make_batch(seed, with_image=seed == 0) for seed in range(4)]
TOTALS = totals_of(MICRO_BATCHES)


def engine_of(model: Aria, **options: Any) -> DeepSpeedEngine:
    with small_parameters_partitioned():
        return DeepSpeedEngine(
            model=model,
            mesh=mesh_of(MeshConfig(dp_replicate=1, dp_shard=-1, ep=1)),
            source=RandomInit(model, mixed.SEED),
            device=torch.device("cpu"),
            compile=False,
            precision="fp32",
            offload="none",
            **({"optimizer": OPTIMIZER, "parameters": {}, "recompute": Recompute.none} | options),
        )


def trained(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    engine = engine_of(build_aria(options.pop("tied", False)), **options)
    batches, norms = MICRO_BATCHES[dist.get_rank() :: 2], []
    for _ in range(2):
        for index, batch in enumerate(batches, start=1):
            engine.forward_backward(batch, NextToken(BALANCE), TOTALS, last=index == 2)
        norms.append(engine.gradient_norm(0.1))
        engine.step(1.0)
        with torch.no_grad():
            logits_TV = engine.model(MICRO_BATCHES[dist.get_rank()], with_logits=True).logits_TV
    return {"norms": norms, "end": whole_state(engine), "logits": logits_TV.clone()}


def some() -> dict[str, Any]:
    """What is never left out."""
    found: dict[str, Any] = {name: trained(VARIANTS[name]) for name in ("zero 2 full", "zero 3")}
    for stage in MIXED_STAGES:
        mixed_engine = partial(engine_of, zero_stage=stage, optimizer=mixed.OPTIMIZER)
        found[f"mixed {stage}"] = mixed.on_ranks(mixed_engine, whole_state)
    return found


def every() -> dict[str, Any]:
    return {name: trained(options) for name, options in VARIANTS.items()}


def joint_loss(model: Aria, batches: Sequence[Batch], totals: StepTotals) -> Tensor:
    """What the ranks' shares of a micro-batch add up to: it is balanced over all of them."""
    value = torch.zeros(())
    outputs = [model(batch) for batch in batches]
    routers = [output.router for output in outputs if output.router is not None]
    counts_LME = torch.stack([stats.tokens_per_expert_ME for stats in routers]).sum(0)
    for output, stats in zip(outputs, routers, strict=True):
        value = value + output.loss_sum / totals.target_tokens
        value = value + balance_loss(stats, counts_LME, BALANCE).loss_sum / totals.tokens
    return value


def reference(options: dict[str, Any]) -> dict[str, Any]:
    model = build_aria(options.get("tied", False))
    materialize(model, RandomInit(model, mixed.SEED), torch.device("cpu"))
    rules = options.get("parameters", {})
    optimizer = OPTIMIZER(parameter_groups(model, rules, *optimizer_defaults(OPTIMIZER)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for _ in range(2):
        for pair in (MICRO_BATCHES[:2], MICRO_BATCHES[2:]):
            joint_loss(model, pair, TOTALS).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits_TV = model(MICRO_BATCHES[0], with_logits=True).logits_TV
    end = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"norms": norms, "end": end, "logits": logits_TV}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_ranks(some, 2, timeout=900.0)[0]


@pytest.mark.parametrize("variant", ["zero 2 full", "zero 3"])
def test_two_steps_equal_one_plain_process(variant: str, results: Any) -> None:
    assert_equals_one(results[variant], variant)


@pytest.mark.slow
def test_every_variant_equals_one_plain_process() -> None:
    results = run_ranks(every, 2, timeout=900.0)[0]
    for variant in VARIANTS:
        assert_equals_one(results[variant], variant)


def assert_equals_one(run: dict[str, Any], variant: str) -> None:
    wanted = reference(VARIANTS[variant])
    assert run["norms"] == pytest.approx(wanted["norms"], rel=1e-6)
    for name, value in wanted["end"].items():
        if name in run["end"]:
            assert float((run["end"][name] - value).abs().max()) <= BOUND, name
    assert {name for name in run["end"] if name.startswith("model.")} == wanted["end"].keys()
    assert float((run["logits"] - wanted["logits"]).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", mixed.CASES)
@pytest.mark.parametrize("stage", MIXED_STAGES)
def test_ranks_with_unlike_media_equal_one_process(stage: int, case: str, results: Any) -> None:
    mixed.assert_equals_one(results[f"mixed {stage}"][case], case)
