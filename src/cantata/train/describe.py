"""Gathers what the start-up report and the closing line say, from the parts that know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from cantata.core import dist
from cantata.core.build import build
from cantata.data.drops import sum_drops
from cantata.data.held_out import HeldOut
from cantata.data.loader import Loader
from cantata.models.lora import matched
from cantata.models.protocol import AssembledFrom, Trainable
from cantata.parallel.expert import check_ranks
from cantata.parallel.mesh import MeshSizes, validate
from cantata.train import humane
from cantata.train.engine import Engine
from cantata.train.evaluate import Evaluation
from cantata.train.flops import device_name
from cantata.train.listeners import Telemetry
from cantata.train.memory import MemoryEstimate, estimate_memory, layout_of
from cantata.train.optim import optimizer_defaults, parameter_groups
from cantata.train.progress import Summary
from cantata.train.stage import LanguageStage, LoRAStage, Stage
from cantata.train.startup import Experts, GroupRow, SourceRow, StartupReport
from cantata.train.tokenizer_stage import TokenizerStage
from cantata.train.traffic import Traffic, traffic


class Needs(NamedTuple):
    """What only the whole, unsharded model can tell."""

    experts: Experts | None
    memory: MemoryEstimate | None
    """Known on rank 0 alone."""
    traffic: Traffic | None


def needs(stage: Stage, model: nn.Module, loader: Loader) -> Needs:
    """Asked for before an engine takes the model apart."""
    assert isinstance(model, Trainable)
    mesh = validate(stage.mesh, dist.world_size())
    # Rank 0 alone estimates, and would find it alone.
    for layer in model.moe_layers():
        check_ranks(layer.router.num_experts, mesh.ep)
    sent = exchanged(stage, model, mesh) if isinstance(stage, LanguageStage) else None
    return Needs(experts(model), memory(stage, model, loader, mesh), sent)


def experts(model: Trainable) -> Experts | None:
    """What the model holds and what one token uses; call it before an engine partitions the parameters."""
    layers = model.moe_layers()
    if not layers:
        return None
    routed = sum(parameter.numel() for layer in layers for parameter in layer.experts.parameters())
    total = sum(parameter.numel() for _, parameter in model.named_parameters())
    num_experts, top_k = layers[0].router.num_experts, layers[0].router.top_k
    return Experts(len(layers), num_experts, top_k, total, total - routed + routed * top_k // num_experts)


def exchanged(stage: LanguageStage, model: Trainable, mesh: MeshSizes) -> Traffic | None:
    """What a rank sends to the experts of others; None where it holds all of them."""
    train = stage.train
    return traffic(
        model,
        mesh.ep,
        train.micro_batch_size * train.sequence_length,
        layout_of(stage.engine, build(stage.optimizer), mesh).compute_dtype,
        train.recompute,
        train.gradient_accumulation_steps,
    )


def memory(stage: Stage, model: Trainable, loader: Loader, mesh: MeshSizes) -> MemoryEstimate | None:
    """What a rank will need; called before an engine takes the model, and answered by rank 0 alone.

    It is found on a batch like those to come, run through the model without data.
    """
    assert isinstance(model, nn.Module)
    parameter_groups(model, stage.parameters, *optimizer_defaults(build(stage.optimizer)))
    if not dist.is_main():
        return None
    return estimate_memory(
        model,
        layout_of(stage.engine, build(stage.optimizer), mesh),
        loader.peek(),
        stage.train.recompute,
        torch.device("meta"),
        stage.train.gradient_accumulation_steps,
    )


def report(
    stage: Stage,
    kind: str,
    model: Trainable,
    engine: Engine,
    needs: Needs,
    loader: Loader,
    held_out: HeldOut,
    start_step: int,
    notes: Sequence[str],
) -> StartupReport:
    """What this run is about to do."""
    train, length = stage.train, sample_tokens(stage, loader)
    tokens = train.micro_batch_size * length * train.gradient_accumulation_steps * dist.world_size()
    return StartupReport(
        stage=kind,
        name=stage.name,
        out=stage.out,
        origin=origin(stage, model, start_step),
        engine=engine.settings,
        mesh=validate(stage.mesh, dist.world_size())._asdict(),
        world_size=dist.world_size(),
        device=device_name(dist.device()),
        versions=f"torch {torch.__version__}",
        groups=[
            GroupRow(row.name, row.parameters, row.learning_rate, row.weight_decay) for row in engine.summary
        ],
        experts=needs.experts,
        sources=[SourceRow(name, size, share) for name, size, share in loader.shares()],
        held_out=[SourceRow(f"{name} (held out)", size, None) for name, size in held_out.sizes().items()],
        max_steps=train.max_steps,
        micro_batch_size=train.micro_batch_size,
        row="rows" if isinstance(stage, LanguageStage) else "images",
        token="tokens" if isinstance(stage, LanguageStage) else "codes",
        sequence_length=length,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        memory=needs.memory,
        traffic=needs.traffic,
        flops_per_step=tokens * model.flops_per_token(length),
        notes=[*adapters(stage, model), *unheard(stage), *unmeasured(stage), *notes],
    )


def sample_tokens(stage: Stage, loader: Loader) -> int:
    """Tokens of a packed row; of image tokenizers the codes of one of the next images."""
    if isinstance(stage, LanguageStage):
        return stage.train.sequence_length
    codes: int = loader.peek().codes_per_image
    return codes


def adapters(stage: Stage, model: Trainable) -> list[str]:
    """What each pattern under `lora.targets` has matched."""
    assert isinstance(model, nn.Module)
    if not isinstance(stage, LoRAStage):
        return []
    lora, lines = stage.lora, matched(model)
    width = max(len(line.pattern) for line in lines)
    begun = "new" if lora.adapter is None else f"from {lora.adapter}"
    rows = [
        f"  {pattern:<{width}}  {count:,} targets, {humane.count(size)} parameters"
        for pattern, count, size in lines
    ]
    return [f"LoRA r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g} ({begun})", *rows]


def unheard(stage: Stage) -> list[str]:
    """Whether the run ends before an image tokenizer hears of its critic."""
    if not isinstance(stage, TokenizerStage) or stage.critic is None:
        return []
    start, end = stage.critic.start_generator, stage.train.max_steps
    if start < end:
        return []
    return [f"critic.start_generator={start}, train.max_steps={end}: the model never hears of the critic"]


def unmeasured(stage: Stage) -> list[str]:
    """What evaluations of an image tokenizer leave out for want of weights."""
    if not isinstance(stage, TokenizerStage) or stage.inception is not None or not stage.train.eval_every:
        return []
    return ["eval/rfid is left out: inception names no file of weights"]


def dropped(loader: Loader, held_out: HeldOut) -> list[str]:
    """What was left out since the run began, a line a source, over all ranks; a collective."""
    everywhere = sum_drops(json.loads(text) for text in dist.gather_strings(json.dumps(loader.dropped())))
    lines = []
    for kind, counts in (("training", everywhere), ("held-out", held_out.dropped)):
        for source, reasons in sorted(counts.items()):
            said = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
            lines.append(f"left out {sum(reasons.values())} {kind} samples of {source}: {said}")
    return lines


def origin(stage: Stage, model: object, start_step: int) -> str:
    """Where the parameters come from."""
    if start_step:
        return f"resumed from step-{start_step:08d}"
    parts = model.parts() if isinstance(model, AssembledFrom) else ()
    if parts:
        return (
            ", ".join(f"{len(part.names)} tensors from {part.directory}" for part in parts) + ", others new"
        )
    weights = stage.model["weights"]
    return "from scratch" if weights is None else f"from weights {weights}"


def summary(
    stage: Stage,
    outcome: str,
    step: int,
    seconds: float,
    telemetry: Telemetry,
    evaluation: Evaluation,
) -> Summary:
    """How the run ended: `outcome`, and the losses."""
    return Summary(
        outcome=outcome,
        step=step,
        seconds=seconds,
        out=stage.out,
        loss=telemetry.last_loss,
        held_out_before=evaluation.first_loss,
        held_out_after=evaluation.last_loss,
    )
