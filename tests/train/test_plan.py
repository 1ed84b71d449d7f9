"""Plans against plain arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.models.protocol import LanguageModel
from cantata.nn.lora import is_factor
from cantata.parallel.fsdp import shard_dimension
from cantata.tools.plan import read_stage
from cantata.train.likely import META, likely_batch
from cantata.train.memory import GIB, estimate_memory, layout_of
from cantata.train.plan import Plan, make_plan
from cantata.train.stage import PretrainStage, build_model
from tests.train.test_stage import TINY

ROOT = Path(__file__).resolve().parents[2]
MINI = ("train.micro_batch_size=1", "train.sequence_length=256")
ROUTED = ("experts.fc1", "experts.fc2")


def stage(*overrides: str) -> PretrainStage:
    return read_stage("pretrain", overrides, None)


def language_model(chosen: PretrainStage) -> LanguageModel:
    model = build_model(chosen)
    assert isinstance(model, LanguageModel)
    return model


def shard_elements(chosen: PretrainStage, plan: Plan) -> dict[str, int]:
    """Elements of every parameter on rank 0: the first of equal cuts along one dimension, rounded up."""
    found = {}
    for name, parameter in language_model(chosen).named_parameters():
        shape, shards = list(parameter.shape), plan.mesh.dp_shard
        if name.endswith(ROUTED):
            shape[0] //= plan.mesh.ep
            shards = plan.mesh.efsdp
        cut = shard_dimension(type(parameter.shape)(shape), shards)
        shape[cut] = -(-shape[cut] // shards)
        found[name] = 1
        for size in shape:
            found[name] *= size
    return found


def check_shards(chosen: PretrainStage, plan: Plan) -> None:
    elements = shard_elements(chosen, plan)
    frozen = [rule.removesuffix("*") for rule, value in chosen.parameters.items() if value.frozen]
    trained = {
        name: count
        for name, count in elements.items()
        if not name.startswith(tuple(frozen)) and "post_layernorm" not in name
    }
    assert plan.memory.parameters == 4 * sum(elements.values())
    assert plan.memory.gradients == 4 * sum(trained.values())
    # Two moments, and the step's number of each tensor.
    assert plan.memory.optimizer == 8 * sum(trained.values()) + 4 * len(trained)
    whole = sum(parameter.numel() for _, parameter in language_model(chosen).named_parameters())
    assert sum(group.parameters for group in plan.groups) == whole
    # No expert is padded, whatever is cut: padding of the rest is all that rounds up.
    experts = sum(count for name, count in elements.items() if name.endswith(ROUTED))
    of_experts = sum(
        parameter.numel()
        for name, parameter in language_model(chosen).named_parameters()
        if name.endswith(ROUTED)
    )
    assert experts * plan.mesh.dp_shard == of_experts


@pytest.mark.parametrize(
    "overrides",
    [
        ("cluster.gpus=1",),
        ("cluster.gpus=4", "mesh.ep=2"),
        ("cluster.gpus=32", "mesh.ep=16"),
        ("cluster.gpus=8", "mesh.ep=4", "mesh.dp_replicate=2"),
        # 2 local experts among 16 ranks: their first dimension cannot be cut, the second can.
        ("cluster.gpus=128", "mesh.ep=8"),
    ],
)
def test_every_parameter_is_cut_into_its_shards(overrides: tuple[str, ...]) -> None:
    chosen = stage(*MINI, *overrides)
    check_shards(chosen, make_plan(chosen))
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [64, 256, 512])
def test_aria_25b_on_many_ranks(gpus: int) -> None:
    chosen = stage("experiment=aria_25b_stage1", "mesh.ep=8", f"cluster.gpus={gpus}")
    plan = make_plan(chosen)
    check_shards(chosen, plan)
    assert (plan.mesh.ep, plan.mesh.efsdp, plan.notes) == (8, gpus // 8, [])
    # 8,192 tokens go to 6 experts each, 7 of 8 on another rank, 2,560 bf16 values a row.
    assert plan.traffic is not None
    assert plan.traffic.bytes_each == 8192 * 6 * 7 // 8 * 2560 * 2
    assert plan.traffic.per_step == 2 * 2 * 28 * 2
    assert plan.tokens_per_step == 8192 * 2 * gpus
    assert plan.images == 0


def test_the_formula_of_the_start_up_report_is_as_good() -> None:
    chosen = stage(*MINI, "cluster.gpus=8", "mesh.ep=4")
    plan, model = make_plan(chosen), language_model(chosen)
    layout = layout_of(chosen.engine, build(chosen.optimizer), plan.mesh)
    batch = likely_batch(chosen, model)
    estimate = estimate_memory(model, layout, batch, chosen.train.recompute, META, 1)
    assert estimate.parts() == pytest.approx(plan.memory.parts(), rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_adapters_leave_as_it_came_is_held_in_what_it_computes_with(precision: str) -> None:
    overrides = (
        "experiment=emoji_lora",
        *MINI,
        f"engine.precision={precision}",
        "cluster.gpus=4",
        "mesh.ep=2",
    )
    chosen = read_stage("lora", overrides, None)
    plan, model = make_plan(chosen), language_model(chosen)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    factors = sum(size for name, size in sizes.items() if is_factor(name))
    base = sum(sizes.values()) - factors
    expected = (base * (2 if precision == "bf16" else 4) + factors * 4) / 4
    # Shards are rounded up to whole rows.
    assert plan.memory.parameters == pytest.approx(expected, rel=0.02)
    assert plan.memory.gradients == pytest.approx(factors, rel=0.1)
    layout, batch = layout_of(chosen.engine, build(chosen.optimizer), plan.mesh), likely_batch(chosen, model)
    estimate = estimate_memory(model, layout, batch, chosen.train.recompute, META, 1)
    assert estimate.parameters == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_is_planned_by_formula(zero_stage: int) -> None:
    chosen = stage(
        *TINY, *MINI, "engine=deepspeed", f"engine.zero_stage={zero_stage}", "cluster.gpus=4", "mesh.ep=2"
    )
    memory = make_plan(chosen).memory
    counts = {name: parameter.numel() for name, parameter in language_model(chosen).named_parameters()}
    frozen = sum(count for name, count in counts.items() if "post_layernorm" in name)
    experts = sum(count for name, count in counts.items() if name.endswith(ROUTED))
    dense = sum(counts.values()) - experts
    each, total = experts // 2, dense - frozen
    assert memory.parameters == 2 * (dense + each)
    shares = (-(-total // 4) + each // 2) if zero_stage else total + each
    assert memory.optimizer == 12 * shares
    assert memory.gradients == 4 * (shares if zero_stage == 2 else total + each)


def test_offloaded_shards_are_not_on_the_device() -> None:
    memory = make_plan(stage(*TINY, *MINI, "engine.offload=parameters", "cluster.gpus=2")).memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == (0, 0, 0)
    assert memory.activations > 0


def test_images_take_half_of_a_row_where_they_are_trained_on() -> None:
    chosen = stage(*MINI, "train.micro_batch_size=2")
    batch = likely_batch(chosen, language_model(chosen))
    assert batch.samples.lengths == (256, 256)
    # 16 features and 64 patches each.
    assert (batch.images.features.total, batch.images.patches.total) == (256, 16 * 64)
    chosen.collator["processor"].pop("patch_size")
    with pytest.raises(ConfigError, match=r"collator\.processor\.patch_size is not there"):
        likely_batch(chosen, language_model(chosen))


def test_of_a_model_that_reads_across_one_of_many_tokens_is_an_image() -> None:
    """An image stands at the beginning of every 512 tokens, and has all its tiles."""
    chosen = stage("experiment=mllama_mini", "train.micro_batch_size=2", "train.sequence_length=1100")
    batch = likely_batch(chosen, language_model(chosen))
    assert batch.images.first_tokens == (0, 512, 1100, 1612)
    assert set(batch.images.features.lengths) == {1}
    assert set(batch.images.patches.lengths) == {4 * 16}
    alone = stage("experiment=mllama_mini", "model.vision=null")
    assert likely_batch(alone, language_model(alone)).images.patches.lengths == ()
    chosen.collator["processor"].pop("patch_size")
    with pytest.raises(ConfigError, match=r"collator\.processor\.patch_size is not there"):
        likely_batch(chosen, language_model(chosen))


def test_adapters_beside_a_frozen_tower_are_trained_on_images_all_the_same() -> None:
    rule = "{learning_rate: null, weight_decay: null, frozen: true}"
    for frozen, images in (("vision.*",), 8), (("vision.*", "projector.*"), 0):
        rules = ", ".join(f"{pattern}: {rule}" for pattern in frozen)
        overrides = ("experiment=emoji_lora", *MINI, f"+parameters={{{rules}}}")
        chosen = read_stage("lora", overrides, None)
        assert len(likely_batch(chosen, language_model(chosen)).images.patches.lengths) == images


def test_whether_it_fits() -> None:
    plan = make_plan(stage(*TINY, *MINI, "cluster.memory_gib=1000"))
    assert plan.fits is True
    values: dict[str, Any] = vars(plan)
    assert Plan(**values | {"limit_gib": plan.memory.total / GIB / 2}).fits is False
    assert Plan(**values | {"limit_gib": None}).fits is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("cluster.gpus=6", "mesh.ep=4"), r"mesh\.ep=4 must divide the 6 ranks"),
        (("cluster.gpus=6", "mesh.dp_replicate=4"), r"does not make the world of 6 ranks"),
        (("cluster.gpus=3", "mesh.ep=3"), r"mesh\.ep=3 must divide the number of experts \(4\)"),
        (("cluster.gpus=3", "mesh.ep=3", "engine=deepspeed"), r"mesh\.ep=3 must divide the number of exp"),
        (("engine.offload=optimizer",), r"engine\.offload=optimizer is not offered by fsdp2"),
        (("engine=deepspeed", "engine.zero_stage=4"), r"engine\.zero_stage=4 must be"),
        (("engine=deepspeed", "engine.zero_stage=3", "cluster.gpus=4", "mesh.ep=2"), r"zero_stage=3"),
        (("train.compile=true", "train.recompute=full"), r"would run uncompiled"),
        (("+parameters={nothing: {learning_rate: null, weight_decay: null, frozen: true}}",), r"matches no"),
    ],
)
def test_what_training_refuses_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(stage(*TINY, *MINI, *overrides))
    assert not dist.is_initialized()


def test_streams_that_ranks_cannot_share_are_told_of() -> None:
    plan = make_plan(stage(*TINY, *MINI, "data.streams=6", "cluster.gpus=4"))
    assert plan.notes == ["data.streams=6 must become a multiple of 4 before this can run"]


def test_a_tokenizers_plan_says_what_it_leaves_out() -> None:
    judged = ("critic=patchgan", "perceptual=mobilenet", "train.max_steps=1500")
    notes = make_plan(read_stage("vq", judged, None)).notes
    assert notes == [
        "critic.start_generator=1500, train.max_steps=1500: the model never hears of the critic",
        "critic and perceptual: no part of the memory above",
    ]
    assert not make_plan(read_stage("vq", (), None)).notes
    heard = make_plan(read_stage("vq", (*judged[:1], "train.max_steps=1501"), None)).notes
    assert heard == ["critic: no part of the memory above"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoji_lora", "aimv2_mini", "emoji_vq"])
def test_the_plan_is_near_what_steps_really_take(name: str) -> None:
    """In a process of its own, as another one's memory would count; on the run's own data."""
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_memory.py"), "--one", name, "--steps", "2"]
    done = subprocess.run([*command, "--data", "."], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plan"] == pytest.approx(found["measured"], rel=0.1)
