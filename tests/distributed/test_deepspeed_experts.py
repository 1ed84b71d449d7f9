"""Aria with experts spread over ranks under ZeRO, against one plain process.

The bound is absolute, on weights of order 0.1: the order of sums over ranks, tokens and micro-batches
differs. Three steps of AdamW at a rate of 1e-2 move every weight by up to 3e-2, so that a wrong scale, norm
or group shows four orders of magnitude above it.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cantata.parallel.recompute import Recompute
from cantata.train.checkpoint import CheckpointConfig, Checkpointer, fingerprint
from cantata.train.deepspeed import DeepSpeedEngine
from cantata.train.engine import Engine
from cantata.train.optim import ParameterRule
from tests.distributed.expert_ranks import (
    DENSE,
    EP,
    MAX_NORM,
    STEPS,
    build,
    build_fsdp2,
    one_step,
    reference,
)
from tests.distributed.spawn import run_ranks
from tests.distributed.test_deepspeed import equal, whole_state, worst
from tests.distributed.test_deepspeed_aria import FROZEN, build_aria
from tests.distributed.test_fsdp2 import whole

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs cantata[deepspeed]"),
]

BOUND = 1e-6
# One layer's experts are frozen, the other's learn at a rate of their own, without decay.
RULES = {
    "text.layers.*.mlp.experts.*": ParameterRule(5e-3, 0.0, frozen=False),
    "text.layers.0.mlp.experts.*": FROZEN,
}
ALL_FROZEN = {"text.layers.*.mlp.experts.*": FROZEN}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero_stage": stage} for stage in (0, 1, 2)},
    **{f"zero {stage} offload": {"zero_stage": stage, "offload": "optimizer"} for stage in (1, 2)},
    "zero 0 rules": {"zero_stage": 0, "parameters": RULES},
    "zero 1 rules selective": {"zero_stage": 1, "parameters": RULES, "recompute": Recompute.selective},
    "zero 2 rules full": {"zero_stage": 2, "parameters": RULES, "recompute": Recompute.full},
    "zero 2 all frozen": {"zero_stage": 2, "parameters": ALL_FROZEN},
}
ON_PAIRS = ("zero 0", "zero 1 rules selective", "zero 2", "zero 2 offload", "zero 2 rules full")
"""What two pairs of ranks run: every stage, and every way that gradients go between the pairs."""
BF16: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero_stage": stage, "precision": "bf16"} for stage in (0, 1, 2)},
    "zero 1 rules": {"zero_stage": 1, "precision": "bf16", "parameters": RULES},
}


def trained(options: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, slice] = {}
    engine = build(record=rows, **options)
    start = whole_state(engine)
    norms, counts, aux = zip(*(one_step(engine) for _ in range(STEPS)), strict=True)
    return {
        "start": start,
        "norms": list(norms),
        "counts": torch.stack(counts),
        "aux": torch.stack(aux),
        "end": whole_state(engine),
        "summary": engine.summary,
        "rows": rows,
    }


def on_ranks(folder: Path) -> dict[str, Any]:
    """Everything that a world is asked for; one start of DeepSpeed serves all of it."""
    pair = dist.get_world_size() == 2
    return {
        "runs": {name: trained(VARIANTS[name]) for name in (VARIANTS if pair else ON_PAIRS)},
        "bf16": {name: trained(options) for name, options in BF16.items() if pair},
        "handed on": handed_on(folder),
        "interrupted": {stage: interrupted(stage) for stage in ((0, 1, 2) if pair else (2,))},
    }


def handed_on(folder: Path) -> dict[str, Any]:
    """A state of experts that are everywhere, through every stage with experts spread and back."""
    dense = build(DENSE, zero_stage=1)
    one_step(dense)
    saved = whole_state(dense)
    one_step(dense)
    broken, resumed, state = [], {}, saved
    for name, mesh, stage in (("0", EP, 0), ("1", EP, 1), ("2", EP, 2), ("dense", DENSE, 2)):
        engine = build(mesh, seed=99, zero_stage=stage)
        engine.load_state_dict(state)
        state = whole_state(engine)
        if not equal(state, saved):
            broken.append(f"{name}: {worst(state, saved)}")
        one_step(engine)
        resumed[name] = worst(whole_state(engine), whole_state(dense))[0]
    return {"broken": broken + through_files(folder, saved), "resumed": resumed}


def through_files(folder: Path, state: dict[str, Tensor]) -> list[str]:
    """Checkpoints of one engine loaded by the next; returns those that changed a bit."""
    engines: list[Engine] = [
        build(zero_stage=2),
        build_fsdp2(),
        build(DENSE, seed=99, zero_stage=1),
        build_fsdp2(),
    ]
    engines[0].load_state_dict(state)
    broken = []
    config = CheckpointConfig(every=1, keep=1, background=False, resume="auto", best=None)
    for number, (writer, reader) in enumerate(pairwise(engines)):
        files = Checkpointer(folder / str(number), config, fingerprint(build_aria()))
        files.save(1, writer, {}, {})
        files.load(files.path(1), reader)
        files.close()
        if isinstance(reader, DeepSpeedEngine):
            taken = whole_state(reader)
        else:
            taken = {name: whole(value) for name, value in reader.state_dict().items()}
        if not equal(taken, state):
            broken.append(f"file {number}: {worst(taken, state)}")
    return broken


def interrupted(stage: int) -> tuple[float, bool, float]:
    """The norm with a loss that is no number on one rank, and what the skipped step left behind."""
    engine, clean = build(zero_stage=stage), build(zero_stage=stage)
    start = whole_state(engine)
    norm, _, _ = one_step(engine, factor=float("nan"))
    untouched = equal(whole_state(engine), start)
    one_step(engine)
    one_step(clean)
    return norm, untouched, worst(whole_state(engine), whole_state(clean))[0]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Two ranks with all experts between them, and two such pairs."""
    folders = {world: tmp_path_factory.mktemp("checkpoints") for world in (2, 4)}
    return {world: run_ranks(on_ranks, world, folders[world], timeout=900.0) for world in folders}


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, worlds: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = worlds[request.param]
    return found


@pytest.mark.parametrize(
    ("world", "variant"), [*((2, name) for name in VARIANTS), *((4, name) for name in ON_PAIRS)]
)
def test_three_steps_equal_one_plain_process(world: int, variant: str, worlds: Any) -> None:
    run, wanted = worlds[world][0]["runs"][variant], reference(world, VARIANTS[variant])
    assert worst(run["start"], wanted["start"])[0] == 0.0
    assert torch.equal(run["counts"], wanted["counts"])
    assert run["norms"] == pytest.approx(wanted["norms"], rel=1e-6)
    assert min(run["norms"]) > MAX_NORM, "nothing would be clipped"
    assert torch.allclose(run["aux"], wanted["aux"], rtol=1e-6)
    assert worst(run["end"], wanted["end"])[0] <= BOUND
    assert {name for name in run["end"] if name.startswith("model.")} == wanted["end"].keys()


def test_bf16_stages_agree_and_follow_fp32(worlds: Any) -> None:
    runs, exact = worlds[2][0]["bf16"], worlds[2][0]["runs"]["zero 1"]
    for stage in ("zero 1", "zero 2"):
        assert runs[stage]["norms"] == pytest.approx(runs["zero 0"]["norms"], rel=1e-6)
        assert worst(runs[stage]["end"], runs["zero 0"]["end"])[0] <= BOUND
    assert runs["zero 1"]["norms"] == pytest.approx(exact["norms"], rel=0.05)
    frozen = "model.text.layers.0.mlp.experts.fc1"
    for when in ("start", "end"):
        # What is frozen rests in the compute dtype.
        assert torch.equal(runs["zero 1 rules"][when][frozen], exact["start"][frozen].bfloat16())


def test_states_know_no_layout(results: Any) -> None:
    for found in results:
        assert found["handed on"]["broken"] == []
        assert max(found["handed on"]["resumed"].values()) <= BOUND


def test_a_gradient_that_is_no_number_stops_every_rank(results: Any) -> None:
    for found in results:
        for norm, untouched, difference in found["interrupted"].values():
            assert not math.isfinite(norm)
            assert untouched
            assert difference == 0.0


def test_a_rank_reads_its_own_experts_only(results: Any) -> None:
    for rank, found in enumerate(results):
        for run in found["runs"].values():
            rows = run["rows"]
            experts = {name: part for name, part in rows.items() if ".experts." in name}
            assert experts
            for part in experts.values():
                assert rank % 2 * 2 <= part.start < part.stop <= rank % 2 * 2 + 2


def test_the_report_counts_whole_experts(results: Any) -> None:
    lines = results[0]["runs"]["zero 2"]["summary"]
    parameters = sum(parameter.numel() for parameter in build_aria().parameters())
    assert sum(line.parameters for line in lines) == parameters
