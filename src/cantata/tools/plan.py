"""`cantata plan STAGE [overrides]`: what a run would hold, send and compute on any number of ranks.

It needs no device, no weights and no data: files that a config names are not opened, and those that it leaves
to the user need not be given, unless `--batches` asks for the data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.text import Text

from cantata.core.config import compose, load, missing_keys
from cantata.core.errors import ConfigError
from cantata.core.schema import dotted
from cantata.core.suggest import hint
from cantata.core.target import TARGET
from cantata.tools import plan_find
from cantata.tools.arguments import Parser
from cantata.train import humane, startup
from cantata.train.find import find
from cantata.train.hours import Hours
from cantata.train.plan import Plan, make_plan
from cantata.train.stage import FineTuneStage, LoRAStage, PretrainStage, Stage
from cantata.train.startup import GroupRow
from cantata.train.tokenizer_stage import TokenizerStage

STAGES: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "sft": FineTuneStage,
    "lora": LoRAStage,
    "vq": TokenizerStage,
}
OF_DATA = ("data.", "collator.")
UNREAD = ("model.weights", "model.vision_weights", "model.vision.weights", "perceptual.")
"""Where a config may leave values to the user that a plan has no use for."""
STAND_IN = "not-read-by-plan"


def read_stage(
    name: str, overrides: Sequence[str], config_dir: Path | None, *, with_data: bool = False
) -> Stage:
    """The stage's config as training composes it; raises `ConfigError`.

    with_data: whether the data will be read, and so must be said.
    """
    if name not in STAGES:
        raise ConfigError(f"{name} is no stage that can be planned{hint(name, STAGES)}")
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is no folder")
    search = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.absolute()}]"]
    node, origins = compose(name, [*search, *overrides])
    for key in map(dotted, missing_keys(OmegaConf.to_container(node))):
        if key.startswith(UNREAD if with_data else UNREAD + OF_DATA):
            OmegaConf.update(node, key, STAND_IN)
    return load(node, STAGES[name], origins)


def figures(kind: str, stage: Stage, plan: Plan) -> dict[str, Any]:
    """Everything as plain values: memory and traffic in bytes, of one rank unless the name says otherwise."""
    rows = _group_rows(plan)
    trained, frozen = startup.split_counts(rows)
    memory, traffic = plan.memory, plan.traffic
    return {
        "stage": kind,
        "name": stage.name,
        "ranks": plan.ranks,
        "mesh": {**plan.mesh._asdict(), "efsdp": plan.mesh.efsdp},
        "engine": dict(stage.engine),
        "recompute": stage.train.recompute.value,
        "tokens_per_step": plan.tokens_per_step,
        "micro_batch": {
            "tokens": plan.tokens_per_micro_batch,
            "images": plan.images,
            "patches": plan.patches,
            "per_step": stage.train.gradient_accumulation_steps,
        },
        "parameters": {
            "total": trained + frozen,
            "trained": trained,
            "frozen": frozen,
            "active": trained + frozen if plan.experts is None else plan.experts.active_parameters,
            "groups": [group._asdict() for group in plan.groups],
        },
        "memory": {**asdict(memory), "total": memory.total},
        "all_to_all": None
        if traffic is None
        else {
            "rows": traffic.rows,
            "bytes": traffic.bytes_each,
            "buffer_bytes": traffic.buffer_bytes,
            "per_step": traffic.per_step,
            "bytes_per_step": traffic.bytes_per_step,
        },
        "flops_per_step": plan.flops_per_step,
        "flops_per_step_per_rank": plan.flops_per_step / plan.ranks,
        "gpu": stage.cluster.gpu,
        "mfu": stage.cluster.mfu,
        **(dict.fromkeys(Hours._fields) if plan.hours is None else plan.hours._asdict()),
        "memory_gib": plan.limit_gib,
        "fits": plan.fits,
        "notes": plan.notes,
    }


def render(kind: str, stage: Stage, plan: Plan) -> RenderableType:
    """The same for people, in the style of the start-up report."""
    axes = {**plan.mesh._asdict(), "efsdp": plan.mesh.efsdp if plan.mesh.ep > 1 else 1}
    options = ", ".join(f"{key} {value}" for key, value in stage.engine.items() if key != TARGET)
    accumulation = stage.train.gradient_accumulation_steps
    batches = f"{accumulation} micro-batch" + ("es" if accumulation > 1 else "")
    token = "codes" if isinstance(stage, TokenizerStage) else "tokens"
    patches = f", {plan.patches:,} patches" if plan.patches else ""
    images = f"{plan.images} images{patches}" if plan.images else "no images"
    facts = [
        ("devices", startup.ranks_text(plan.ranks, axes)),
        ("engine", f"{stage.engine[TARGET].rpartition('.')[2]}, {options}"),
        ("step", f"{plan.tokens_per_step:,} {token}, {humane.flops(plan.flops_per_step)} over all ranks"),
        ("rank", f"{batches} of {plan.tokens_per_micro_batch:,} {token}, {images}"),
        ("recompute", stage.train.recompute.value),
    ]
    if plan.hours is not None:
        facts.append(("time", _time(stage, plan.hours)))
    if plan.experts is not None:
        facts.append(("experts", startup.experts_text(plan.experts)))
    if plan.traffic is not None:
        facts.append(("exchange", startup.traffic_text(plan.traffic)))
    parts: list[RenderableType] = [
        Text(f"cantata plan {kind}: {stage.name}", style="bold", overflow="fold"),
        startup.facts_table(facts),
        startup.groups_table(_group_rows(plan)),
        startup.memory_table(plan.memory),
        *(Text(f"  {line}", overflow="fold") for line in (*_fit(plan), *plan.notes)),
    ]
    return RichGroup(*parts)


def _time(stage: Stage, hours: Hours) -> str:
    cluster, steps = stage.cluster, stage.train.max_steps
    rate = f"{humane.count(hours.tokens_per_second_per_gpu)} tok/s on each {cluster.gpu}"
    whole = f"{humane.duration(hours.hours * 3600)}, {humane.hours(hours.gpu_hours)} GPU hours"
    return f"{hours.step_seconds:.3g} s a step at MFU {cluster.mfu:g}, {rate}; {steps:,} steps: {whole}"


def _group_rows(plan: Plan) -> list[GroupRow]:
    return [
        GroupRow(group.name, group.parameters, group.learning_rate, group.weight_decay)
        for group in plan.groups
    ]


def _fit(plan: Plan) -> list[str]:
    if plan.limit_gib is None:
        return []
    verdict = "fits into" if plan.fits else "does not fit into"
    return [f"{humane.size(plan.memory.total)} {verdict} {plan.limit_gib:g} GiB"]


def main(arguments: Sequence[str]) -> int:
    """The command: 0 whether the run fits or not; `ConfigError` for what training would refuse."""
    parser = Parser(prog="cantata plan", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        help="as of the stage, and cluster.gpus, cluster.gpu, cluster.memory_gib, cluster.mfu",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=0,
        metavar="N",
        help="read the first N micro-batches of the data, and plan for the largest of them",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with overlays of your own")
    parser.add_argument(
        "--find",
        action="store_true",
        help="look for micro-batch, mesh.ep and train.recompute that fit the memory, the fastest first",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    given = parser.parse_intermixed_args(list(arguments))
    if given.find and given.batches:
        raise ConfigError(
            "--find tries micro-batches of many sizes, none of which is read; leave out --batches"
        )
    if given.batches < 0:
        raise ConfigError(f"--batches {given.batches} must be at least 0")
    stage = read_stage(given.stage, given.overrides, given.config_dir, with_data=given.batches > 0)
    if given.find:
        search = find(stage)
        content, text = plan_find.figures(search, stage), plan_find.render(given.stage, stage, search)
    else:
        plan = make_plan(stage, given.batches)
        content, text = figures(given.stage, stage, plan), render(given.stage, stage, plan)
    sys.stdout.write(json.dumps(content, indent=2) + "\n" if given.json else startup.plain(text))
    return 0
