"""Which objective makes the better encoder: the paper's comparison in small, reported as it comes out.

    python benchmarks/aimv2_objectives.py [--steps 1500] [--seeds 3] [--quick] [--plot FILE]

AIMv2's paper (arXiv:2411.14402, table 9) orders them: pixels alone < captions read bidirectionally < captions
under a prefix mask < both. Each run is `cantata pretrain experiment=aimv2_mini` with another objective and as
many steps, on captions that are names alone. Then `cantata probe` trains an attentive probe on the frozen
encoder to tell the ten groups of emoji, which no caption names; a fifth of the images is held out from both.
An encoder that has learned nothing is probed as well. All in fp32. There is no peer: nobody else trains
these.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

SHARE = "0.2"
QUICK = ("train.micro_batch_size=1", "model.vision.num_hidden_layers=1", "model.decoder.num_hidden_layers=1")
BIDIRECTIONAL = "collator._target_=cantata.data.collate.PackedCollator"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "pixels": ("objective.image_weight=1.0", "objective.text_weight=0.0"),
    "captions_bidirectional": ("objective.image_weight=0.0", BIDIRECTIONAL),
    "captions_prefix": ("objective.image_weight=0.0",),
    "both": ("objective.image_weight=0.4",),
}
"""Overrides of `aimv2_mini` by what is learned; `nothing` is probed as it begins."""


def run(*arguments: str) -> str:
    """Standard output of a verb; fails where it does."""
    command = [sys.executable, "-m", "cantata", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def accuracy(
    folder: Path, name: str, steps: int, probe_steps: int, seed: int, changes: tuple[str, ...]
) -> tuple[float, float]:
    """Of the probe on an encoder with that objective, and the share of the commonest group."""
    out = folder / f"{name}-{seed}"
    data = [f"data.{part}.emoji.dataset" for part in ("sources", "held_out")]
    rate = "optimizer.lr=0.0" if name == "nothing" else "optimizer.lr=2e-3"
    run(
        *("pretrain", "experiment=aimv2_mini", f"out={out}", f"seed={seed}", rate, "engine.precision=fp32"),
        *(f"train.max_steps={1 if name == 'nothing' else steps}", "train.eval_every=0", "checkpoint.every=0"),
        *(f"{part}.held_out_share={SHARE}" for part in data),
        *(f"{part}.caption='{{name}}'" for part in data),
        *(*OBJECTIVES[name], *changes),
    )
    given = ("--held-out-share", SHARE, "--steps", str(probe_steps), "--seed", str(seed), "--json")
    shown = json.loads(run("probe", str(out), "--label", "group", *given))
    return shown["accuracy"], shown["majority"]


def show(found: dict[str, list[float]], majority: float, steps: int) -> None:
    """A Markdown table, the same as figures, and whether the paper's order came out."""
    print(f"\n| learned in {steps} steps | accuracy of the probe | by seed |\n|---|---|---|")
    for name, values in found.items():
        seeds = ", ".join(f"{value:.1%}" for value in values)
        print(f"| {name} | {statistics.mean(values):.1%} | {seeds} |")
    print(f"| the commonest group | {majority:.1%} | |")
    means = {name: statistics.mean(values) for name, values in found.items() if name != "nothing"}
    order = " < ".join(sorted(means, key=lambda name: means[name]))
    print(f"order: {order}; the paper's: {' < '.join(means)}")
    for name, values in found.items():
        print(f"figure accuracy_{name} {statistics.mean(values):.4f} share")


def plot(file: Path, found: dict[str, list[float]], majority: float) -> None:
    """A bar for each mean, a dot for each seed, a line for the commonest group."""
    width, height, top = 150, 220, 30
    picture = Image.new("RGB", (width * len(found) + 40, height + top + 40), "white")
    draw = ImageDraw.Draw(picture)
    base = height + top
    for place, (name, values) in enumerate(found.items()):
        left, mean = 20 + place * width, statistics.mean(values)
        draw.rectangle((left, base - height * mean, left + width - 40, base), fill="#4477aa")
        for number, value in enumerate(values):
            x, y = left + 20 + 25 * number, base - height * value
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#ee6677")
        draw.text((left, base + 6), f"{name}\n{mean:.1%}", fill="black")
    line = base - height * majority
    draw.line((10, line, picture.width - 10, line), fill="#bbbbbb", width=2)
    draw.text((20, 6), "held-out emoji whose group an attentive probe tells; dots: seeds", fill="black")
    picture.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each objective (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one step of two small encoders, to see that it works"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the accuracies")
    given = parser.parse_args()
    steps, seeds, probe_steps = (1, 1, 2) if given.quick else (given.steps, given.seeds, 500)
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    found: dict[str, list[float]] = {}
    majority = 0.0
    names, changes = (("pixels", "both"), QUICK) if given.quick else (tuple(OBJECTIVES), ())
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name in names:
                value, majority = accuracy(Path(folder), name, steps, probe_steps, seed, changes)
                found.setdefault(name, []).append(value)
                print(f"seed {seed}, {name}: {value:.1%}", flush=True)
    show(found, majority, steps)
    if given.plot is not None:
        plot(given.plot, found, majority)


if __name__ == "__main__":
    main()
