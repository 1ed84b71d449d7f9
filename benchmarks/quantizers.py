"""Quantisers on one budget: one tokenizer of the embedded emoji with each, and with codes of several widths.

    python benchmarks/quantizers.py [--steps 600] [--quick]

There is no peer: nobody else trains these in one place. Each run is `cantata vq experiment=emoji_vq` with
another quantiser and as many steps; PSNR, SSIM and usage are those of the held-out set after the last step;
seconds are medians over all. The second table repeats LlamaGen's ablation of the code's width
(arXiv:2406.06525, table 3: 8 best, 256 collapsed) with normalised codes. `--plot FILE` draws it.
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
from typing import NamedTuple

from PIL import Image, ImageDraw

OPTIONS = ("ema", "vq", "l2_vq", "simvq", "ibq", "lfq", "fsq", "residual")
WIDTHS = (4, 8, 32, 256)


class Outcome(NamedTuple):
    """What a run came to."""

    psnr: float
    ssim: float
    usage: float
    step_seconds: float


def train(folder: Path, steps: int, *overrides: str) -> Outcome:
    """Run one tokenizer and read its metrics; fails where it does."""
    command = [
        *(sys.executable, "-m", "cantata", "vq", "experiment=emoji_vq", f"out={folder}"),
        *(f"train.max_steps={steps}", f"train.eval_every={steps}", "checkpoint.every=0"),
        *(f"schedule.warmup_steps={steps // 8}", f"schedule.decay_steps={steps // 2}", *overrides),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "eval/psnr" in record)
    seconds = statistics.median(record["step_seconds"] for record in records)
    return Outcome(last["eval/psnr"], last["eval/ssim"], last["eval/usage"], seconds)


def show(title: str, outcomes: dict[str, Outcome]) -> None:
    """A Markdown table, and the same as figures."""
    print(f"\n| {title} | PSNR | SSIM | usage | step |\n|---|---|---|---|---|")
    for name, (psnr, ssim, usage, seconds) in outcomes.items():
        print(f"| `{name}` | {psnr:.2f} dB | {ssim:.3f} | {usage:.1%} | {seconds:.2f} s |")
    for name, outcome in outcomes.items():
        print(f"figure psnr_{name} {outcome.psnr:.3f} dB")


def plot(file: Path, widths: dict[str, Outcome]) -> None:
    """Bars of usage and of PSNR by the width of a code."""
    side, base = 120, 180
    picture = Image.new("RGB", (side * len(widths) + 20, base + 50), "white")
    draw = ImageDraw.Draw(picture)
    for place, (name, outcome) in enumerate(widths.items()):
        left = 20 + place * side
        for offset, share, colour in ((0, outcome.usage, "#4477aa"), (40, outcome.psnr / 30, "#ccbb44")):
            draw.rectangle((left + offset, base - 150 * share, left + offset + 34, base), fill=colour)
        draw.text((left, base + 6), f"{name}: {outcome.usage:.0%}, {outcome.psnr:.1f} dB", fill="black")
    draw.text(
        (20, 4), "usage of 1,024 normalised codes (blue), PSNR of 30 dB (yellow), by width", fill="black"
    )
    picture.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of each run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two steps of two runs, to see that it works")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the second table")
    given = parser.parse_args()
    steps = 2 if given.quick else given.steps
    options, widths = (OPTIONS[:1], WIDTHS[1:2]) if given.quick else (OPTIONS, WIDTHS)
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        by_option = {name: train(runs / name, steps, f"quantizer@model.quantizer={name}") for name in options}
        show(f"quantiser, {steps} steps", by_option)
        by_width = {
            str(dim): train(
                runs / f"l2-{dim}", steps, "quantizer@model.quantizer=l2_vq", f"model.quantizer.dim={dim}"
            )
            for dim in widths
        }
    show(f"width of a normalised code, {steps} steps", by_width)
    if given.plot is not None:
        plot(given.plot, by_width)


if __name__ == "__main__":
    main()
