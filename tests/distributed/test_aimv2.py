"""AIMv2 on two ranks, under FSDP2 and ZeRO-2, equals one process: pretraining, and pairs of all ranks.

Bound 1e-6 in fp32: of gradient norms relative, of weights of order 0.1 absolute.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata.core.gather import gather_rows
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator, PrefixCollator
from cantata.models.aimv2 import Aimv2Contrastive, Aimv2Pretraining
from cantata.parallel.materialize import RandomInit, materialize
from cantata.parallel.recompute import Recompute
from cantata.train.autoregression import MultimodalAutoregression
from cantata.train.contrast import FOUND, Contrastive
from cantata.train.engine import Objective
from cantata.train.metrics import StepSums
from cantata.train.optim import ParameterRule, optimizer_defaults, parameter_groups
from tests.distributed.engines import CPU, build_engine, saved
from tests.distributed.join import join, totals_of
from tests.distributed.spawn import run_ranks
from tests.models.aimv2.small import DECODER, NATIVE, TEXT, contrastive, documents, pair_processor, processor

pytestmark = pytest.mark.distributed

# AdamW divides by what a gradient usually is; of one that is rounding alone it would make a whole step.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2, eps=1e-4, weight_decay=0.1, fused=True)
MAX_NORM, SEED = 0.1, 3
FROZEN = {
    "vision.*": ParameterRule(learning_rate=None, weight_decay=None, frozen=True),
    "vision.head.*": ParameterRule(learning_rate=None, weight_decay=None, frozen=False),
}
CASES = ["patches and text", "all pairs", "frozen tower"]
ENGINES = ["fsdp2", *(["zero 2"] if find_spec("deepspeed") is not None else [])]
ROWS = {
    # The second rank's first micro-batch has text alone; a rank has one pair where the other has three.
    "patches and text": [((0, 1, 2), ("text",)), ((3,), (4, 5))],
    "all pairs": [((0,), (1, 2, 3)), ((4, 5), (6,))],
    "frozen tower": [((0,), (1, 2, 3))],
}
"""What rank 0 and rank 1 see in each micro-batch of a step."""


def build(case: str) -> nn.Module:
    with torch.device("meta"):
        if case == "patches and text":
            return Aimv2Pretraining(NATIVE, DECODER)
        return Aimv2Contrastive(contrastive(NATIVE).vision_config, TEXT, 12, 100.0)


def objective_of(case: str, model: nn.Module) -> Objective:
    return MultimodalAutoregression(model, 0.4, 1.0) if case == "patches and text" else Contrastive(model)


@cache
def micro_batches(case: str) -> list[tuple[Batch, Batch]]:
    pretrains = case == "patches and text"
    collator = PrefixCollator(processor(NATIVE)) if pretrains else PackedCollator(pair_processor(NATIVE))

    def made(row: tuple[Any, ...], padding: int) -> Batch:
        examples = documents(7)
        text = type(examples[0])(("words alone",))
        chosen = [text if one == "text" else examples[one] for one in row]
        samples = [collator.encode(one, f"s:{number}") for one, number in zip(chosen, row, strict=True)]
        return collator.collate([collator.row(samples)], sum(map(len, samples)) + padding)

    return [(made(first, 0), made(second, 3)) for first, second in ROWS[case]]


def totals_of_step(case: str) -> Any:
    return totals_of([batch for pair in micro_batches(case) for batch in pair])


def train(name: str, case: str) -> dict[str, Any]:
    rules = FROZEN if case == "frozen tower" else {}
    options = {"parameters": rules, "recompute": Recompute.selective}
    engine = build_engine(name, build(case), SEED, OPTIMIZER, **options)
    objective, norms, told = objective_of(case, engine.model if name == "fsdp2" else build(case)), [], []
    batches = [pair[dist.get_rank()] for pair in micro_batches(case)]
    for _ in range(2):
        sums = StepSums()
        for index, batch in enumerate(batches, start=1):
            last = index == len(batches)
            sums.add(engine.forward_backward(batch, objective, totals_of_step(case), last=last))
        norms.append(engine.gradient_norm(MAX_NORM))
        told.append(sums.reduced())
        engine.step(1.0)
    state = saved(engine)
    if name == "fsdp2":
        held = sum(v.to_local().numel() for k, v in engine.state_dict().items() if k.endswith(".exp_avg"))
    else:
        held = sum(flat.numel() for flat in engine._stage.flats())
    return {"norms": norms, "sums": told, "end": state, "held": held}


def gathered() -> dict[str, Any]:
    """Rows of ranks that hold 3 and 0, 0 and 2, 1 and 2, and the gradient of a sum that only they share."""
    found = {}
    for counts in ((3, 0), (0, 2), (1, 2)):
        generator = torch.Generator().manual_seed(5)
        whole = torch.randn(sum(counts), 4, generator=generator)
        weights = torch.randn(2, sum(counts), 4, generator=generator)
        own = whole[counts[0] * dist.get_rank() :][: counts[dist.get_rank()]].clone().requires_grad_()
        rows, start = gather_rows(own)
        (rows.square() * weights[dist.get_rank()]).sum().backward()
        expected = (2 * whole * weights.sum(0))[start : start + len(own)]
        found[counts] = torch.equal(rows, whole) and torch.allclose(own.grad, expected, atol=1e-6)
    return found


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}: {case}": train(name, case) for name in ENGINES for case in CASES}
    return found | {"gathered": gathered()}


def reference(case: str) -> dict[str, Any]:
    """The same in plain torch, on one process that holds what both ranks hold."""
    model = build(case)
    materialize(model, RandomInit(model, SEED), CPU)
    rules = FROZEN if case == "frozen tower" else {}
    optimizer = OPTIMIZER(parameter_groups(model, rules, *optimizer_defaults(OPTIMIZER)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms, told = [], []
    for _ in range(2):
        sums = StepSums()
        for pair in micro_batches(case):
            loss = objective_of(case, model)(model, join(pair), totals_of_step(case))
            loss.value.backward()
            sums.add(loss.sums)
        norm = torch.stack([p.grad.double().norm() for p in trained if p.grad is not None]).norm()
        torch.nn.utils.clip_grads_with_norm_(trained, MAX_NORM, norm)
        norms.append(norm.item())
        told.append(sums.reduced())
        optimizer.step()
        optimizer.zero_grad()
    end = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    return {"norms": norms, "sums": told, "end": end}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each rank found, all in one start of the processes."""
    return run_ranks(everything, 2, timeout=400.0)


@cache
def expected(case: str) -> dict[str, Any]:
    return reference(case)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(ranks: list[dict[str, Any]], engine: str, case: str) -> None:
    wanted, found = expected(case), [rank[f"{engine}: {case}"] for rank in ranks]
    assert min(wanted["norms"]) > MAX_NORM, "nothing would be clipped"
    for one in found:
        assert one["norms"] == pytest.approx(wanted["norms"], rel=2e-6)
        for mine, theirs in zip(one["sums"], wanted["sums"], strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-6)
    # Of a ZeRO engine every rank holds a part of the names.
    state: dict[str, Tensor] = {name: value for one in found for name, value in one["end"].items()}
    for name, value in wanted["end"].items():
        assert float((state[name] - value).abs().max()) <= 1e-6, name
    if case == "frozen tower":
        assert not any(name.startswith("optimizer.vision.layers") for name in state)
        assert any(name.startswith("optimizer.vision.head") for name in state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_a_rank_keeps_half_of_the_state(ranks: list[dict[str, Any]], engine: str, case: str) -> None:
    trained = [p for name, p in build(case).named_parameters() if case != "frozen tower" or is_trained(name)]
    total = sum(parameter.numel() for parameter in trained)
    held = [rank[f"{engine}: {case}"]["held"] for rank in ranks]
    assert sum(held) >= total
    # What does not divide evenly, and what ZeRO pads to.
    assert max(held) <= total / 2 + 64 * len(trained)


def is_trained(name: str) -> bool:
    return not name.startswith("vision.") or name.startswith("vision.head.")


def test_gathered_rows_and_their_gradients(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["gathered"] == dict.fromkeys(rank["gathered"], True)
        assert len(rank["gathered"]) == 3


def test_pairs_are_told_from_those_of_the_other_rank(ranks: list[dict[str, Any]]) -> None:
    """One pair alone would be found, at a loss of 0."""
    sums = ranks[0]["fsdp2: frozen tower"]["sums"][0]
    assert sums["targets_M"].sum() == 4
    assert sums["loss_sum"] > 0.1
    assert 0 <= sums[FOUND] <= 4
