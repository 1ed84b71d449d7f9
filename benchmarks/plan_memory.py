"""What `cantata plan` says a mini experiment needs, against the most memory that its steps took.

    python benchmarks/plan_memory.py [--quick] [--steps N] [--only NAME ...]

Every experiment runs its first steps on its own data in a process of its own, from random weights, by the
engine, objective and loop of a real run, without evaluations and checkpoints. What it took is measured: on
CUDA by the allocator's peak, on the CPU by adding up the profiler's allocation events. The plan is that of
`--batches` for the same micro-batches; beside it stands the one that reads no data. Two data sets are not at
hand: `nlvr_mini` reads emoji with a sentence each, and `emu3_mini` random codes, as many as `emoji_vq` gives.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as arrow
import torch
from pyarrow import parquet

from cantata.core.build import build
from cantata.core.dist import device, distributed
from cantata.core.locate import asset
from cantata.core.samples import Codes, Document
from cantata.data.tokenized import MANIFEST, SCHEMA, to_record
from cantata.tools.plan import read_stage
from cantata.train import rng
from cantata.train.critic import WithCritic
from cantata.train.engine import Engine, Objective
from cantata.train.listeners import Codebook
from cantata.train.loop import Listener, Progress, fit
from cantata.train.objectives import NextToken
from cantata.train.plan import make_plan
from cantata.train.preempt import StopRequest
from cantata.train.stage import PretrainStage, Stage, build_data, build_engine, build_model, build_objective
from cantata.train.tokenizer_stage import TokenizerStage, build_image_data
from cantata.train.tokenizer_stage import build_objective as build_tokenizer_objective
from cantata.train.watchdog import Watchdog

Overrides = tuple[str, ...]
RANDOM = ("model.weights=null",)
EXPERIMENTS: dict[str, tuple[str, Overrides]] = {
    "aria_mini": ("pretrain", ()),
    "emoji_sft": ("sft", RANDOM),
    "emoji_lora": ("lora", RANDOM),
    "nlvr_mini": ("sft", RANDOM),
    "nlvr_mini_lora": ("lora", RANDOM),
    "mllama_mini": ("pretrain", ()),
    "aimv2_mini": ("pretrain", ()),
    "aimv2_mini_lit": ("pretrain", ("model.vision_weights=null",)),
    "aria_mini_aimv2": ("pretrain", ("model.vision.weights=null",)),
    "emu3_mini": ("pretrain", ()),
    "emoji_vq": ("vq", ()),
}
OWN_DATA = {
    "emu3_mini": {"draw": "codes", "name": "codes"},
    "nlvr_mini": {"chat": "drawings.parquet"},
    "nlvr_mini_lora": {"chat": "drawings.parquet"},
}
"""Data that are written first, by source."""
QUICK = ("emoji_lora", "aimv2_mini_lit", "emoji_vq")
WANTED = 0.1


def measured(stage: Stage) -> int:
    """Most bytes that training holds at once, weights and optimizer included."""
    model = build_model(stage)
    is_tokenizer = isinstance(stage, TokenizerStage)
    loader, _ = build_image_data(stage, model) if is_tokenizer else build_data(stage, model)

    def train() -> None:
        rng.seed_all(stage.seed, 0)
        engine, objective = _parts(stage, model)
        listeners: list[Listener] = [Codebook(model.quantizer)] if is_tokenizer else []
        gc.collect()
        schedule = build(stage.schedule)
        start, stop, watchdog = Progress(), StopRequest(), Watchdog(None, Path(os.devnull), 0)
        fit(engine, objective, iter(loader), schedule, stage.train, listeners, start, stop, watchdog)

    with distributed():
        return _peak_of(train)


def _parts(stage: Stage, model: torch.nn.Module) -> tuple[Engine, Objective]:
    if isinstance(stage, TokenizerStage):
        objective, critic = build_tokenizer_objective(stage, model)
        engine = build_engine(stage, model)
        return (engine if critic is None else WithCritic(engine, critic)), objective
    wanted = build_objective(stage, model) if isinstance(stage, PretrainStage) else NextToken(model.balance)
    return build_engine(stage, model), wanted


def _peak_of(train: Callable[[], None]) -> int:
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train()
        return torch.cuda.max_memory_allocated()
    return harness.peak_bytes(train)


def one(name: str, steps: int, data: Path) -> dict[str, int]:
    """Bytes: `measured`, `plan` for the batches that were read, `likely` for none."""
    kind, overrides = EXPERIMENTS[name]
    for source, path in OWN_DATA.get(name, {}).items():
        overrides = (*overrides, f"data.sources.{source}.dataset.path={data / path}")
    chosen = [f"experiment={name}", *overrides, "data.num_workers=0", f"train.max_steps={steps}"]
    if not torch.cuda.is_available():
        chosen.append("cluster.gpu=cpu")
    stage = read_stage(kind, chosen, None, with_data=True)
    batches = steps * stage.train.gradient_accumulation_steps
    return {
        "plan": make_plan(stage, batches).memory.total,
        "likely": make_plan(stage).memory.total,
        "measured": measured(stage),
    }


def write_data(folder: Path) -> None:
    """The embedded emoji: with sentences as NLVR has them, and as random codes that `tokenize` leaves."""
    emoji = parquet.read_table(asset("embedded:twemoji.parquet"), columns=["image", "name"])
    names = emoji["name"].to_pylist()
    sentences = [
        f"There is one {name} and no {other}." for name, other in zip(names, names[::-1], strict=True)
    ]
    drawings = {
        "image": emoji["image"],
        "sentence": sentences,
        "label": ["True", "False"] * (len(names) // 2),
    }
    parquet.write_table(arrow.table(drawings), folder / "drawings.parquet")
    random, records = np.random.default_rng(0), []
    for index, name in enumerate(names):
        grid = random.integers(1024, size=(1, 8, 8))
        records.append(to_record(index, Document((Codes(grid), name)), [grid]))
    shard = folder / "codes" / "emoji" / "00000.parquet"
    shard.parent.mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(records, schema=SCHEMA), shard)
    described = {"samples": len(names), "shards": 1}
    manifest = {"tokenizer": "random", "num_codes": 1024, "sources": {"emoji": described}}
    (folder / "codes" / MANIFEST).write_text(json.dumps(manifest))


def in_a_process(name: str, steps: int, data: Path) -> dict[str, Any]:
    """`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--steps", str(steps), "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(names: Sequence[str], steps: int, data: Path) -> None:
    lines = []
    print(f"{'MiB':16}  measured      plan  plan / measured  without data / measured")
    for name in names:
        found = in_a_process(name, steps, data)
        mib = {key: value / 2**20 for key, value in found.items()}
        share, guess = (mib[key] / mib["measured"] for key in ("plan", "likely"))
        mark = "" if abs(share - 1) <= WANTED else "  off"
        print(
            f"{name:16}{mib['measured']:10.1f}{mib['plan']:10.1f}{share:17.3f}{guess:25.3f}{mark}", flush=True
        )
        lines.append((name, mib["measured"], share))
    for name, size, share in lines:
        harness.figure(f"memory_{name}", size, "MiB (measured)")
        harness.figure(f"memory_plan_{name}", share, "of measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three experiments of two steps")
    parser.add_argument("--steps", type=int, default=0, help="steps of each; 8 by default")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=EXPERIMENTS)
    parser.add_argument("--one", choices=EXPERIMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    steps = given.steps or (2 if given.quick else 8)
    if given.one:
        print(json.dumps(one(given.one, steps, given.data)))
        return
    print(harness.environment())
    with tempfile.TemporaryDirectory() as data:
        write_data(Path(data))
        compare(given.only or (QUICK if given.quick else list(EXPERIMENTS)), steps, Path(data))


if __name__ == "__main__":
    main()
