"""Run directories made by hand, as a run would leave them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from cantata.core.logging import get_logger, logging_to
from cantata.train.expert_counts import CountsFile, ExpertCounts
from cantata.train.history import History

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&\"'{{ 7 * 7 }}"
LAYERS, MODALITIES, EXPERTS = 3, 3, 8


def record(step: int, loss: float | None) -> dict[str, Any]:
    """A line as the loop writes it, shortened."""
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.5,
        "learning_rate": 1e-3 * step,
        "tokens": 100 * step,
        "target_tokens": 40 * step,
        "tokens_per_second_per_device": 200.0 + step % 7,
        "step_seconds": 0.5,
        "data_seconds": 0.05,
        "memory_gib": 1.25,
        "mfu": None,
        "loss/text": loss,
        "experts/load_max": 2.0,
        **{f"experts/load_max/layer_{layer:02d}": 1.0 + layer for layer in range(LAYERS)},
    }


def lines(steps: int) -> list[dict[str, Any]]:
    """A run that was evaluated before its first step and at its last."""
    found = [record(step, 8.0 / step) for step in range(1, steps + 1)]
    found[0] |= {"eval/initial/loss": 9.0, "eval/initial/accuracy": 0.0}
    found[-1] |= {"eval/loss": 2.5, "eval/accuracy": 0.5}
    return found


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def make_run(out: Path, steps: int = 12, **config: Any) -> Path:
    """A finished run with everything that one can leave behind, and hostile texts wherever a text may be."""
    write_lines(out / "metrics.jsonl", lines(steps))
    settings = {"name": f"run {EVIL}", "seed": 1, "train": {"max_steps": steps}, "data": {EVIL: [EVIL]}}
    (out / "config.yaml").write_text(yaml.safe_dump(settings | config))
    with logging_to(out), History(out) as history:
        environment = {"host": EVIL, "versions": {"torch": "2.13.0"}, "commit": None}
        history.start(0, f"from weights {EVIL}", environment)
        for _ in range(2):
            get_logger("cantata.test").warning("look out %s", EVIL, extra={"shown": True})
        history.end(steps, "done", 0)
    logging.getLogger("cantata").setLevel(logging.NOTSET)
    (out / "logs" / "startup.txt").write_text(f"cantata pretrain: {EVIL}\n")
    make_samples(out / "samples")
    make_counts(out / "experts" / "counts.npy", steps)
    return out


def make_samples(folder: Path) -> None:
    for step, said in ((0, EVIL), (12, "a cat\u202e")):
        one = {"sample": f"emoji:{EVIL}", "truth": EVIL, "answer": said, "right": step == 12}
        one["images"] = ["pictures/cat.png", "../../x.png"]
        write_lines(folder / f"step-{step:08d}.jsonl", [one])
    (folder / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "pictures" / "cat.png")
    Image.fromarray(pixels).save(folder / "step-00000012.png")


def make_counts(path: Path, steps: int, intervals: int = 2) -> None:
    """Expert 0 of layer 0 is dead, expert 1 of layer 0 hears no text; there is no video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = CountsFile(path, (LAYERS, MODALITIES, EXPERTS), None)
    for interval in range(intervals):
        tokens_LME = torch.ones(LAYERS, MODALITIES, EXPERTS, dtype=torch.int64)
        tokens_LME[:, 2] = 0
        tokens_LME[0, :, 0] = 0
        tokens_LME[0, 0, 1] = 0
        first = interval * steps // intervals + 1
        file.write(ExpertCounts(first, (interval + 1) * steps // intervals, tokens_LME))
    file.close()
