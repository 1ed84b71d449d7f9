"""The search against its own rules."""

from __future__ import annotations

import pytest

from cantata.core.errors import ConfigError
from cantata.models.protocol import Trainable
from cantata.parallel.recompute import Recompute
from cantata.tools.plan import read_stage
from cantata.train.find import (
    HEADROOM,
    SHOWN,
    Candidate,
    Search,
    candidates,
    find,
    marked,
    memory_of,
    step_seconds,
)
from cantata.train.memory import GIB
from cantata.train.plan import make_plan
from cantata.train.stage import Stage, build_model
from tests.train.test_stage import TINY

SMALL = (*TINY, "train.micro_batch_size=4", "train.sequence_length=128", "cluster.gpu=h100", "cluster.gpus=4")


def stage(*overrides: str, kind: str = "pretrain") -> Stage:
    return read_stage(kind, (*SMALL, *overrides), None)


def ways(chosen: Stage) -> list[Candidate]:
    model = build_model(chosen)
    assert isinstance(model, Trainable)
    return list(candidates(chosen, model))


def search(gib: float, *overrides: str) -> Search:
    return find(stage(f"cluster.memory_gib={gib}", *overrides))


def test_every_way_keeps_the_tokens_and_what_training_allows() -> None:
    found = ways(stage("train.gradient_accumulation_steps=2"))
    assert {way.micro_batch_size * way.gradient_accumulation_steps for way in found} == {8}
    assert {way.micro_batch_size for way in found} == {1, 2, 4, 8}
    assert {way.ep for way in found} == {1, 2, 4}
    assert {way.recompute for way in found} == set(Recompute)
    assert len(found) == len(set(found)) == 4 * 3 * 3
    assert {way.ep for way in ways(stage("mesh.dp_replicate=2"))} == {1, 2}
    assert {way.recompute for way in ways(stage("train.compile=true"))} == {Recompute.none}
    assert {way.ep for way in ways(stage("engine=deepspeed", "engine.zero_stage=3"))} == {1}


def test_a_loss_over_pairs_keeps_its_micro_batch() -> None:
    pairs = ("experiment=aimv2_mini_lit", "model.vision_weights=null", "cluster.gpu=h100")
    found = ways(read_stage("pretrain", pairs, None))
    assert {(way.ep, way.micro_batch_size) for way in found} == {(1, 4)}


def test_what_is_found_fits_and_the_fastest_is_first() -> None:
    roomy = search(10.0)
    assert len(roomy.fitting) == SHOWN
    times = [found.step_seconds for found in roomy.fitting]
    # A way that only repeats more of the same is none of its own.
    assert len({one.candidate._replace(recompute=Recompute.none) for one in roomy.fitting}) == SHOWN
    assert times == sorted(times)
    # Where all fits nothing is computed twice.
    assert roomy.fitting[0].candidate.recompute is Recompute.none
    limit = roomy.fitting[0].memory.total / HEADROOM / GIB * 0.8
    tight = search(limit)
    assert tight.fitting
    assert all(found.memory.total <= HEADROOM * limit * GIB for found in tight.fitting)
    assert tight.fitting[0].step_seconds >= times[0]


def test_the_plan_of_what_was_found_says_the_same() -> None:
    found = search(10.0).fitting[0]
    plan = make_plan(stage(*found.candidate.overrides()))
    # Shards that are counted, rounded up to whole rows, against a formula.
    assert plan.memory.total == pytest.approx(found.memory.total, rel=0.01)
    assert plan.tokens_per_step == make_plan(stage()).tokens_per_step


def test_where_nothing_fits_the_least_is_named() -> None:
    found = search(1e-3)
    assert found.fitting == []
    everything = [one.memory.total for one in search(10.0).fitting]
    assert found.smallest.memory.total <= min(everything)
    assert found.smallest.candidate.micro_batch_size == 1
    assert found.smallest.candidate.recompute is Recompute.full


def test_what_needs_more_than_what_failed_is_not_tried() -> None:
    base = Candidate(2, Recompute.selective, 4, 1)
    assert base._replace(micro_batch_size=8).needs_no_less(base)
    assert base._replace(recompute=Recompute.none).needs_no_less(base)
    assert not base._replace(recompute=Recompute.full).needs_no_less(base)
    assert not base._replace(micro_batch_size=2).needs_no_less(base)
    assert not base._replace(ep=4).needs_no_less(base)
    assert base.needs_no_less(base._replace(ep=4))
    assert not base._replace(ep=1).needs_no_less(base)


@pytest.mark.parametrize("kind", ["pretrain", "lora"])
def test_experts_that_are_spread_further_need_no_more(kind: str) -> None:
    chosen = stage("model.weights=null", kind=kind)
    model = marked(chosen)
    sizes = [
        memory_of(chosen, model, Candidate(ep, recompute, 4, 1)).total
        for recompute in Recompute
        for ep in (2, 4)
    ]
    assert all(wide >= narrow for wide, narrow in zip(sizes[::2], sizes[1::2], strict=True))


@pytest.mark.parametrize(("kind", "more"), [("pretrain", 4 / 3), ("lora", 3 / 2)])
def test_forward_twice_costs_a_third_and_under_adapters_a_half(kind: str, more: float) -> None:
    chosen = stage("cluster.gpus=1", *(("model.weights=null",) if kind == "lora" else ()), kind=kind)
    model = build_model(chosen)
    assert isinstance(model, Trainable)
    none, full = (
        step_seconds(chosen, model, Candidate(1, recompute, 4, 1))
        for recompute in (Recompute.none, Recompute.full)
    )
    # One rank: nothing travels.
    assert full / none == pytest.approx(more)


def test_without_a_gpu_there_is_nothing_to_look_for() -> None:
    for gpu in ("null", "cpu"):
        with pytest.raises(ConfigError, match=r"--find needs cluster\.gpu, the name of a GPU"):
            find(stage(f"cluster.gpu={gpu}", "cluster.memory_gib=80"))
