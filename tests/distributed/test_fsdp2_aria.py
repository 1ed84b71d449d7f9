"""Aria under FSDP2: ranks with and without images, against one plain process.

Bound 1e-6 in fp32, absolute, on gradients up to order 0.1; recompute must not change a bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import Batch, Images, Segments
from cantata.models.aria import Aria
from cantata.models.aria.config import AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.engine import Engine
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken
from tests.distributed import mixed
from tests.distributed.join import join, totals_of
from tests.distributed.mesh import mesh_of
from tests.distributed.spawn import run_ranks
from tests.distributed.standin import make_batch
from tests.distributed.test_fsdp2 import assert_same, whole
from tests.nn.moe.small import balance

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
TOKENS, FEATURES, SIDE = 24, 4, 4
VISION = AriaVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=2,
    num_channels=3,
    layer_norm_eps=1e-6,
    initializer_range=0.2,
)
MOE = AriaMoEConfig(
    num_experts=5,
    top_k=2,
    num_shared_experts=1,
    expert_intermediate_size=16,
    num_groups=1,
    top_groups=1,
    balance=balance(5, aux=1e-2, z=1e-3, bias=1e-3),
)


def build(tied: bool) -> Aria:
    text = AriaTextConfig(
        vocab_size=19,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        moe=MOE,
    )
    with torch.device("meta"):
        return Aria(VISION, AriaProjectorConfig({SIDE * SIDE: FEATURES}, 0.2), text, image_token_id=9)


def batches() -> list[Batch]:
    """One with an image, one without: rank 0's and rank 1's."""
    with_image, without = (make_batch(TOKENS, seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(2)
    patches = torch.randint(0, 256, (SIDE * SIDE, 12), generator=generator, dtype=torch.uint8)
    positions = torch.arange(SIDE * SIDE)
    segments = (Segments((SIDE * SIDE,)), Segments((FEATURES,)))
    image = Images(patches, positions, *segments, torch.arange(2, 2 + FEATURES))
    index = torch.empty(0, dtype=torch.int64)
    none = Images(torch.empty(0, 12, dtype=torch.uint8), index, Segments(()), Segments(()), index)
    return [replace(with_image, images=image), replace(without, images=none)]


BATCHES = batches()
TOTALS = totals_of(BATCHES)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def engine_of(model: Aria, **options: Any) -> FSDP2Engine:
    settings: dict[str, Any] = {
        "source": RandomInit(model, 7),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True),
        "recompute": Recompute.none,
        "precision": "fp32",
    }
    return FSDP2Engine(
        model=model,
        mesh=mesh_of(MeshConfig(1, -1, 1)),
        parameters={},
        compile=False,
        device=CPU,
        state_dtype="fp32",
        offload="none",
        **(settings | options),
    )


def step_of(tied: bool, precision: str, recompute: Recompute) -> dict[str, Any]:
    engine = engine_of(build(tied), precision=precision, recompute=recompute)
    sums = engine.forward_backward(BATCHES[dist.get_rank()], NextToken(MOE.balance), TOTALS, last=True)
    found, norm = gradients(engine.model), engine.gradient_norm(1.0)
    engine.step(1.0)
    counts = sums["tokens_per_expert_LME"]
    dist.all_reduce(counts)
    return {"gradients": found, "norm": norm, "counts": counts}


def mixed_engine(model: Aria) -> FSDP2Engine:
    return engine_of(model, source=RandomInit(model, mixed.SEED), optimizer=mixed.OPTIMIZER)


def whole_state(engine: Engine) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in engine.state_dict().items()}


def variants() -> dict[str, dict[str, Any]]:
    found = {
        f"{'tied' if tied else 'untied'} {mode.value}": step_of(tied, "fp32", mode)
        for tied in (False, True)
        for mode in Recompute
    }
    found |= {f"bf16 {mode.value}": step_of(False, "bf16", mode) for mode in Recompute}
    return found | mixed.on_ranks(mixed_engine, whole_state)


def reference(tied: bool) -> dict[str, Any]:
    model = build(tied)
    materialize(model, RandomInit(model, 7), CPU)
    loss = NextToken(MOE.balance)(model, join(BATCHES), TOTALS)
    loss.value.backward()
    counts = loss.sums["tokens_per_expert_LME"]
    found = gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    return {"gradients": found, "norm": norm, "counts": counts}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run_ranks(variants, 2)[0]


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_equal_one_process(tied: bool, results: Any) -> None:
    wanted = reference(tied)
    for mode in Recompute:
        run = results[f"{'tied' if tied else 'untied'} {mode.value}"]
        assert run["gradients"].keys() == wanted["gradients"].keys()
        assert_same(run["gradients"], wanted["gradients"], 1e-6)
        assert run["norm"] == pytest.approx(wanted["norm"], rel=1e-6)
        assert torch.equal(run["counts"], wanted["counts"])


@pytest.mark.parametrize("case", mixed.CASES)
def test_ranks_with_unlike_media_equal_one_process(case: str, results: Any) -> None:
    mixed.assert_equals_one(results[case], case)


@pytest.mark.parametrize("kind", ["untied", "tied", "bf16"])
def test_recompute_changes_no_bit(kind: str, results: Any) -> None:
    for mode in (Recompute.selective, Recompute.full):
        assert_same(results[f"{kind} {mode.value}"]["gradients"], results[f"{kind} none"]["gradients"], 0.0)


def test_bf16_follows_fp32(results: Any) -> None:
    assert results["bf16 none"]["norm"] == pytest.approx(results["untied none"]["norm"], rel=0.05)
