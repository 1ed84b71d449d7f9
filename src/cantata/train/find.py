"""Micro-batch, spread of the experts and recomputation that fit a memory, the fastest first.

Every candidate trains on as many tokens a step. Its time is an estimate by three rules:

- operations at `cluster.mfu` of the peak. `train.recompute=full` runs forward twice: a third more of them,
  and half more under adapters, whose frozen weights get no gradient. `selective` repeats none that counts;
- bytes that reach a rank at `LINK`: rows to and from experts, weights that are brought together for forward
  and for backward of every micro-batch, and their gradients, in fp32, once in every micro-batch;
- nothing overlaps, so what travels less is ahead. Of equal times that which repeats less is.

Parts of the memory are formulas and a dry run, as in the start-up report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.models.lora import base_names
from cantata.models.protocol import PairEncoder, Trainable
from cantata.parallel.mesh import MeshSizes, validate
from cantata.parallel.recompute import Recompute
from cantata.train import describe
from cantata.train.likely import META, likely, row_tokens
from cantata.train.memory import FP32, GIB, Layout, MemoryEstimate, estimate_memory, layout_of
from cantata.train.one_rank import Elements, expert_ids
from cantata.train.optim import optimizer_defaults, parameter_groups
from cantata.train.stage import LanguageStage, Stage, build_model

LINK = 50e9
"""Bytes a second that reach a rank: one adapter of 400 Gbit/s for each GPU. Within a node they are faster."""
HEADROOM = 0.9
"""Share of the memory that an estimate may fill: allocator, kernels and NCCL need some, too."""
SHOWN = 5


class Candidate(NamedTuple):
    """One way to run the stage; in the order of the memory it takes, all else being equal."""

    ep: int
    recompute: Recompute
    micro_batch_size: int
    gradient_accumulation_steps: int

    def overrides(self) -> list[str]:
        """To paste on a command line."""
        return [
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.gradient_accumulation_steps={self.gradient_accumulation_steps}",
            f"mesh.ep={self.ep}",
            f"train.recompute={self.recompute.value}",
        ]

    @property
    def repeats(self) -> int:
        """How much is computed again, as a rank."""
        return list(Recompute).index(self.recompute)

    def needs_no_less(self, other: Candidate) -> bool:
        """Whether it surely needs as much memory as the other.

        It does with as many rows, where it forgets no more, and where the experts are spread as far or less.
        On one rank alone (`ep` 1) no rows travel, so that compares with itself.
        """
        spread = self.ep == other.ep or 1 < self.ep < other.ep
        return spread and self.micro_batch_size >= other.micro_batch_size and self.repeats <= other.repeats

    def only_repeats_more(self, other: Candidate) -> bool:
        """Whether it is the other but for what it computes again."""
        return self._replace(recompute=other.recompute) == other and self.repeats > other.repeats


class Found(NamedTuple):
    """What a candidate needs."""

    candidate: Candidate
    memory: MemoryEstimate
    step_seconds: float


class Search(NamedTuple):
    """What was found."""

    fitting: list[Found]
    """The fastest first, `SHOWN` at most."""
    smallest: Found
    """Of all that were tried."""
    candidates: int


def find(stage: Stage) -> Search:
    """The best ways to run a stage on `cluster.gpus` GPUs of a kind.

    Raises:
        ConfigError: no GPU is named, or training would refuse the stage.
    """
    cluster = stage.cluster
    if cluster.limit_gib is None or cluster.device is None:
        raise ConfigError("--find needs cluster.gpu, the name of a GPU, such as cluster.gpu=h100")
    validate(stage.mesh, cluster.gpus)
    model = marked(stage)
    ways = list(candidates(stage, model))
    times = {way: step_seconds(stage, model, way) for way in ways}
    fitting: list[Found] = []
    failed: list[Found] = []
    for way in sorted(ways, key=lambda way: (times[way], way.repeats)):
        if any(way.needs_no_less(found.candidate) for found in failed):
            continue
        if any(way.only_repeats_more(found.candidate) for found in fitting):
            continue
        found = Found(way, memory_of(stage, model, way), times[way])
        fits = found.memory.total <= HEADROOM * cluster.limit_gib * GIB
        (fitting if fits else failed).append(found)
        if len(fitting) == SHOWN:
            break
    tried = [*fitting, *failed]
    return Search(fitting, min(tried, key=lambda found: found.memory.total), len(ways))


def candidates(stage: Stage, model: Trainable) -> Iterator[Candidate]:
    """Every combination that training allows and that leaves the tokens of a step as they are.

    A loss that compares all pairs of a micro-batch depends on its size, which then stays.
    """
    train, mesh = stage.train, validate(stage.mesh, stage.cluster.gpus)
    rows = train.micro_batch_size * train.gradient_accumulation_steps
    sizes = [train.micro_batch_size] if isinstance(model, PairEncoder) else _divisors(rows)
    layers = model.moe_layers()
    spreads = _divisors(layers[0].router.num_experts) if layers else [1]
    if stage.engine.get("zero_stage") == 3:
        spreads = [1]
    modes = [Recompute.none] if train.compile else list(Recompute)
    for ep in spreads:
        if mesh.dp_shard % ep == 0:
            for mode in modes:
                yield from (Candidate(ep, mode, size, rows // size) for size in sizes)


def step_seconds(stage: Stage, model: Trainable, way: Candidate) -> float:
    """The estimate that candidates are ranked by: see above."""
    assert isinstance(model, nn.Module)
    cluster, chosen = stage.cluster, _with(stage, way)
    assert cluster.device is not None
    mesh = validate(chosen.mesh, cluster.gpus)
    again = (0.5 if base_names(model) else 1 / 3) if way.recompute is Recompute.full else 0.0
    rows, length = way.micro_batch_size * way.gradient_accumulation_steps, row_tokens(chosen, model)
    operations = rows * length * model.flops_per_token(length) * (1 + again)
    traffic = describe.exchanged(chosen, model, mesh) if isinstance(chosen, LanguageStage) else None
    travelling = 0.0 if traffic is None else traffic.bytes_per_step
    travelling += way.gradient_accumulation_steps * _shared_bytes(model, _layout(chosen), mesh)
    return operations / (cluster.device.flops * cluster.mfu) + travelling / LINK


def _shared_bytes(model: Trainable, layout: Layout, mesh: MeshSizes) -> float:
    """Bytes that reach a rank in a micro-batch because others hold the same weights, or share them."""
    experts, parameters = expert_ids(model), [parameter for _, parameter in model.named_parameters()]
    ranks = mesh.dp_replicate * mesh.dp_shard

    def elsewhere(elements: Elements) -> float:
        return elements.dense * (1 - 1 / ranks) + elements.experts * (1 / mesh.ep - 1 / ranks)

    gathered = elsewhere(Elements.of(parameters, experts)) if layout.gathers else 0.0
    trained = elsewhere(Elements.of((p for p in parameters if p.requires_grad), experts))
    return gathered * 2 * layout.compute_dtype.itemsize + trained * FP32


def memory_of(stage: Stage, model: Trainable, way: Candidate) -> MemoryEstimate:
    """The estimate of the start-up report, on a likely micro-batch."""
    chosen, steps = _with(stage, way), way.gradient_accumulation_steps
    assert isinstance(model, nn.Module)
    batch = likely(chosen, model)
    return estimate_memory(model, _layout(chosen), batch, way.recompute, META, steps)


def marked(stage: Stage) -> Trainable:
    """The model of a stage, with what is frozen marked."""
    model = build_model(stage)
    parameter_groups(model, stage.parameters, *optimizer_defaults(build(stage.optimizer)))
    assert isinstance(model, Trainable)
    return model


def _layout(stage: Stage) -> Layout:
    return layout_of(stage.engine, build(stage.optimizer), validate(stage.mesh, stage.cluster.gpus))


def _with(stage: Stage, way: Candidate) -> Stage:
    train = replace(
        stage.train,
        micro_batch_size=way.micro_batch_size,
        gradient_accumulation_steps=way.gradient_accumulation_steps,
        recompute=way.recompute,
    )
    return replace(stage, train=train, mesh=replace(stage.mesh, ep=way.ep))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
