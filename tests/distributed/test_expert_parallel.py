"""Experts spread over ranks equal one process: loss, gradients, norm, weights, bias and counts.

Ranks hold unequal numbers of tokens, one has no image, one has fewer choices than there are experts. The
reference is one plain process with the samples of all ranks in one batch.

Bound 1e-6 in fp32: absolute on the first step's gradients and on the weights after three AdamW steps, both of
order 0.1, relative on the first norm. Sums over tokens are made in another order on every layout, so weights
part by 1e-7 a step, and the norms after that by up to 2e-6 (measured), for which 5e-6 is allowed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.core.types import IMAGE, PADDING, TEXT, Batch, Images, Segments, StepTotals
from cantata.models.aria import Aria
from cantata.models.aria.vision import patch_position_ids
from cantata.nn.moe.balance import update_expert_bias
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.metrics import StepSums
from cantata.train.objectives import NextToken
from cantata.train.optim import ParameterRule, optimizer_defaults, parameter_groups
from tests.distributed.join import join, totals_of
from tests.distributed.mesh import mesh_of
from tests.distributed.spawn import run_ranks
from tests.distributed.test_fsdp2 import assert_same, whole
from tests.models.aria.small import small_layout
from tests.nn.moe.small import balance

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CPU = torch.device("cpu")
BOUND = 1e-6
STEPS, MAX_NORM, RATE = 3, 0.5, 0.01
# A large eps: where a gradient is zero but for rounding, Adam would make a whole step of it.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, eps=1e-4, weight_decay=0.1, fused=True)
FROZEN = ParameterRule(learning_rate=None, weight_decay=None, frozen=True)
BALANCE = balance(
    8, aux=0.05, groups=4, modality={"text": 0.03, "image": 0.07}, sequence=0.02, z=1e-2, bias=RATE
)
MIXTURE: dict[str, Any] = {"num_experts": 8, "top_k": 3, "balance": BALANCE}
LIMITED = MIXTURE | {"num_groups": 4, "top_groups": 2}
FEW: dict[str, Any] = {"num_experts": 2, "top_k": 1, "balance": balance(2, aux=0.05, z=1e-2, bias=RATE)}

# Options of a run: `mesh`, `mixture`, and arguments of the engine.
VARIANTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ep 1": {"mesh": (1, -1, 1)},
        "ep 2": {"mesh": (1, -1, 2)},
        "ep 2, selective": {"mesh": (1, -1, 2), "recompute": Recompute.selective},
        "ep 2, full": {"mesh": (1, -1, 2), "recompute": Recompute.full},
        "ep 2, groups": {"mesh": (1, -1, 2), "mixture": LIMITED},
        "ep 2, compiled": {"mesh": (1, -1, 2), "compile": True},
        "ep 2, offload": {"mesh": (1, -1, 2), "offload": "parameters"},
        "ep 2, experts frozen": {"mesh": (1, -1, 2), "parameters": {"*.experts.fc?": FROZEN}},
        "ep 2, routers frozen": {"mesh": (1, -1, 2), "parameters": {"*.router.*": FROZEN}},
    },
    4: {
        "ep 1": {"mesh": (1, -1, 1)},
        "ep 2": {"mesh": (1, -1, 2)},
        "ep 4": {"mesh": (1, -1, 4)},
        "ep 2, two copies": {"mesh": (2, -1, 2)},
        "ep 2, full": {"mesh": (1, -1, 2), "recompute": Recompute.full},
        "ep 2, more ranks than experts": {"mesh": (1, -1, 2), "mixture": FEW},
        "ep 2, two copies of few": {"mesh": (2, -1, 2), "mixture": FEW},
    },
}


def build(mixture: dict[str, Any]) -> Aria:
    with torch.device("meta"):
        return Aria(*small_layout(moe=mixture))


def make_batch(seed: int, tokens: int, with_image: bool, padding: int) -> Batch:
    """One sample of `tokens`, with an image of 2 x 2 patches and 2 features or without, then padding."""
    generator = torch.Generator().manual_seed(seed)
    ids_T, labels_T = torch.randint(10, 64, (2, tokens + padding), generator=generator)
    modality_T = torch.full_like(ids_T, TEXT)
    modality_T[tokens:] = PADDING
    labels_T[tokens:] = labels_T[:2] = -100
    patches, features, token_index_Q = Segments(()), Segments(()), torch.empty(0, dtype=torch.int64)
    pixels_PC, positions_P = torch.empty(0, 12, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    if with_image:
        patches, features, token_index_Q = Segments((4,)), Segments((2,)), torch.arange(1, 3)
        pixels_PC = torch.randint(0, 256, (4, 12), dtype=torch.uint8, generator=generator)
        positions_P = patch_position_ids(2, 2, 4)
        modality_T[1:3] = IMAGE
    index_N = (labels_T != -100).nonzero()[:, 0]
    return Batch(
        input_ids_T=ids_T,
        labels_T=labels_T,
        position_ids_T=torch.arange(tokens + padding),
        modality_ids_T=modality_T,
        target_index_N=index_N,
        target_modality_N=torch.full_like(index_N, IMAGE if with_image else TEXT),
        samples=Segments((tokens - 1, 1)),
        images=Images(pixels_PC, positions_P, patches, features, token_index_Q),
    )


# Two micro-batches for each of four ranks; on two ranks the last two stand in their own test world.
SHAPES = ((17, True, 3), (4, False, 0), (9, True, 6), (12, False, 1))
MICRO_BATCHES = [
    [make_batch(10 * rank + micro, tokens + micro, image, padding) for micro in range(2)]
    for rank, (tokens, image, padding) in enumerate(SHAPES)
]


def totals(world_size: int) -> StepTotals:
    held = [batch for rank in range(world_size) for batch in MICRO_BATCHES[rank]]
    return totals_of(held)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def trained(options: dict[str, Any]) -> dict[str, Any]:
    """Three steps of two micro-batches on this world; everything whole."""
    options = dict(options)
    mixture = options.pop("mixture", MIXTURE)
    mesh = mesh_of(MeshConfig(*options.pop("mesh")))
    model = build(mixture)
    engine = FSDP2Engine(
        model=model,
        mesh=mesh,
        source=RandomInit(model, 7),
        optimizer=OPTIMIZER,
        device=CPU,
        precision="fp32",
        state_dtype="fp32",
        **({"parameters": {}, "recompute": Recompute.none, "compile": False, "offload": "none"} | options),
    )
    objective, rank = NextToken(model.balance), dist.get_rank()
    record: dict[str, Any] = {"norms": [], "sums": []}
    for _ in range(STEPS):
        sums = StepSums()
        for micro, batch in enumerate(MICRO_BATCHES[rank]):
            share = engine.forward_backward(batch, objective, totals(dist.get_world_size()), last=micro == 1)
            sums.add(share)
        reduced = sums.reduced()
        record["own"] = share["tokens_per_expert_LME"]
        record.setdefault("gradients", gradients(engine.model))
        record["norms"].append(engine.gradient_norm(MAX_NORM))
        record["sums"].append(reduced)
        engine.step(1.0)
        update_expert_bias(model.moe_layers(), reduced["tokens_per_expert_LME"].sum(1), RATE)
    return record | {"end": {name: whole(value) for name, value in engine.state_dict().items()}}


def world_of(names: list[str]) -> dict[str, dict[str, Any]]:
    # The graphs are what is tested here, not a compiler's kernels, which would round in their own way.
    torch.compile = partial(torch.compile, backend="aot_eager")
    return {name: trained(VARIANTS[dist.get_world_size()][name]) for name in names}


def reference(world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same in plain torch, on one process."""
    model = build(options.get("mixture", MIXTURE))
    materialize(model, RandomInit(model, 7), CPU)
    groups = parameter_groups(model, options.get("parameters", {}), *optimizer_defaults(OPTIMIZER))
    optimizer, objective = OPTIMIZER(groups), NextToken(model.balance)
    learning = [p for p in model.parameters() if p.requires_grad]
    record: dict[str, Any] = {"norms": [], "sums": []}
    for _ in range(STEPS):
        sums = StepSums()
        for micro in range(2):
            batch = join([MICRO_BATCHES[rank][micro] for rank in range(world_size)])
            loss = objective(model, batch, totals(world_size))
            loss.value.backward()
            sums.add(loss.sums)
        reduced = sums.reduced()
        record.setdefault(
            "gradients", {name: gradient.clone() for name, gradient in gradients(model).items()}
        )
        record["norms"].append(torch.nn.utils.clip_grad_norm_(learning, MAX_NORM).item())
        record["sums"].append(reduced)
        optimizer.step()
        optimizer.zero_grad()
        update_expert_bias(model.moe_layers(), reduced["tokens_per_expert_LME"].sum(1), RATE)
    return record | {"end": {f"model.{name}": value for name, value in model.state_dict().items()}}


CASES = [(world_size, name) for world_size, names in VARIANTS.items() for name in names]


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, dict[str, Any]]]]:
    return {
        world_size: run_ranks(world_of, world_size, list(names)) for world_size, names in VARIANTS.items()
    }


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_equals_one_process(world_size: int, name: str, runs: Any) -> None:
    run, wanted = runs[world_size][0][name], reference(world_size, VARIANTS[world_size][name])
    assert run["gradients"].keys() == wanted["gradients"].keys()
    assert_same(run["gradients"], wanted["gradients"], BOUND)
    assert run["norms"][0] == pytest.approx(wanted["norms"][0], rel=BOUND)
    assert run["norms"] == pytest.approx(wanted["norms"], rel=5 * BOUND)
    assert_same(run["end"], wanted["end"], BOUND)
    for step, expected in zip(run["sums"], wanted["sums"], strict=True):
        assert step.keys() == expected.keys()
        for key, value in expected.items():
            if "tokens" in key or "targets" in key or "lengths" in key:
                assert torch.equal(step[key], value), key
            else:
                torch.testing.assert_close(step[key], value, rtol=BOUND, atol=BOUND, msg=key)


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_every_rank_agrees(world_size: int, name: str, runs: Any) -> None:
    first, *others = (rank[name] for rank in runs[world_size])
    for other in others:
        assert other["norms"] == first["norms"]
        assert all(torch.equal(other["end"][key], value) for key, value in first["end"].items())


def test_the_runs_are_as_uneven_as_they_claim(runs: Any) -> None:
    own = [rank["ep 4"]["own"].sum(1) for rank in runs[4]]
    assert len({int(counts_LE.sum()) for counts_LE in own}) == 4, "every rank has its own number of choices"
    assert (own[1] == 0).any(), "a rank without a token for some expert"
    assert not runs[4][1]["ep 4"]["own"][:, IMAGE].any(), "a rank without an image"
    bias = runs[4][0]["ep 4"]["end"]["model.text.layers.0.mlp.router.expert_bias_E"]
    assert bias.abs().sum() > 0


def test_recompute_changes_no_bit(runs: Any) -> None:
    plain = runs[2][0]["ep 2"]["end"]
    for mode in ("selective", "full"):
        assert_same(runs[2][0][f"ep 2, {mode}"]["end"], plain, 0.0)


def test_frozen_experts_and_routers_stay(runs: Any) -> None:
    for part, name in (("experts frozen", "experts.fc1"), ("routers frozen", "router.weight")):
        run = runs[2][0][f"ep 2, {part}"]
        assert not any(key.endswith(name) for key in run["gradients"])
        start = build(MIXTURE)
        materialize(start, RandomInit(start, 7), CPU)
        for key, value in start.state_dict().items():
            if key.endswith(name):
                assert torch.equal(run["end"][f"model.{key}"], value)
