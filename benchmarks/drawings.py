"""Emu3 in small on the embedded emoji: does it draw the right one after a name, and name the right one?

    python benchmarks/drawings.py [--runs DIR] [--names 100] [--sheet FILE] [--quick]

Trains what is not in DIR yet: `cantata vq experiment=emoji_vq`, `cantata tokenize`, `cantata pretrain
experiment=emu3_mini`. Then it draws emoji after names that were trained on and after held-out ones, and asks
which of 20 real emoji, the named one and 19 others of the same split, each drawing is nearest to: by mean
squared difference of pixels, and by the features of MobileNetV2. The other way, codes are read and 20 names
are compared by their likelihood. Chance is 5%. There is no peer: nobody else trains both in one place.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cantata.core.samples import Codes, Document, Part
from cantata.data.sources import CaptionedImages
from cantata.data.split import Split
from cantata.infer.answers import log_likelihoods
from cantata.infer.image_generation import ImageGenerator
from cantata.infer.reconstructions import sheet
from cantata.infer.sampling import SamplingConfig
from cantata.nn.perceptual.mobilenet import MobileNetV2
from cantata.tools.coded import Coder
from cantata.tools.demo import faster_precision
from cantata.tools.open_model import OpenedModel, load, open_model
from cantata.train.reconstruction import normalise

CANDIDATES = 20
SHOWN = 16
CPU = torch.device("cpu")
QUICK = ("train.max_steps=2", "train.eval_every=0", "checkpoint.every=0")


class Named(NamedTuple):
    """Emoji of one split."""

    names: list[str]
    pixels_NCHW: Tensor
    """From -1 to 1."""


def emoji(split: Split, count: int) -> Named:
    """`count` emoji, spread evenly over a split."""
    data = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", split, 0.05)
    count = min(count, len(data))
    chosen = [data[number * len(data) // count].parts for number in range(count)]
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image, _ in chosen])
    return Named([str(name) for _, name in chosen], normalise(pixels.permute(0, 3, 1, 2)))


def train(runs: Path, quick: bool) -> None:
    """What is in the folder already goes on, or is done at once."""
    short = QUICK if quick else ()
    codes = f"data.sources.draw.dataset.path={runs / 'codes'}"
    precision = f"engine.precision={faster_precision()}"
    for command in (
        ("vq", "experiment=emoji_vq", f"out={runs / 'vq'}", *short),
        ("tokenize", f"tokenizer={runs / 'vq'}", f"out={runs / 'codes'}"),
        ("pretrain", "experiment=emu3_mini", f"out={runs / 'emu3'}", codes, precision, *short),
    ):
        subprocess.run([sys.executable, "-m", "cantata", *command], check=True)


def candidates(count: int) -> list[list[int]]:
    """For each of `count` emoji its own index, then those of 19 others."""
    chooser = random.Random(0)
    others = [[i for i in range(count) if i != own] for own in range(count)]
    return [
        [own, *chooser.sample(left, min(CANDIDATES - 1, count - 1))]
        for own, left in zip(range(count), others, strict=True)
    ]


def nearest(drawn_NCHW: Tensor, real_NCHW: Tensor) -> dict[str, float]:
    """How often the named emoji is the nearest of its candidates."""
    network = MobileNetV2(None)
    right = {"pixels": 0, "features": 0}
    with torch.no_grad():
        features_NF, drawn_NF = network.features(real_NCHW), network.features(drawn_NCHW)
    for own, group in enumerate(candidates(len(real_NCHW))):
        by_pixels = (real_NCHW[group] - drawn_NCHW[own]).square().flatten(1).mean(1)
        by_features = torch.cosine_similarity(features_NF[group], drawn_NF[own][None])
        right["pixels"] += int(by_pixels.argmin() == 0)
        right["features"] += int(by_features.argmax() == 0)
    return {name: count / len(real_NCHW) for name, count in right.items()}


def likeliest(model: torch.nn.Module, opened: OpenedModel, codes: Sequence[Codes], names: list[str]) -> float:
    """How often an emoji's own name is the likeliest of its candidates' after its codes."""
    right = 0
    for own, group in enumerate(candidates(len(names))):
        pairs: list[tuple[Part, ...]] = [(codes[own], names[index]) for index in group]
        encode = opened.collator.processor.encode
        samples = [encode(Document(parts), "benchmark") for parts in pairs]
        scores = log_likelihoods(model, opened.collator, samples)
        right += scores.index(max(scores)) == 0
    return right / len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the runs there (default: nowhere)")
    parser.add_argument("--names", type=int, default=100, help="of each split (%(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="how much the name counts (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.4, help="of the codes (%(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="save real emoji above drawn ones")
    parser.add_argument("--quick", action="store_true", help="two steps and four names, to see that it works")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) if given.runs is None else given.runs
        train(runs, given.quick)
        opened = open_model(runs / "emu3")
        coder = Coder(runs / "vq", opened, None)
        model = load(opened, CPU, torch.float32)
    generator = ImageGenerator(model, opened.collator, max_positions=opened.max_positions, max_open=16)
    sampling = SamplingConfig(
        max_new_tokens=1,
        temperature=given.temperature,
        top_k=64,
        top_p=1.0,
        repetition_penalty=1.0,
        stop=(),
        seed=0,
    )
    shown = []
    for split in (Split.train, Split.held_out):
        names, real_NCHW = emoji(split, 4 if given.quick else given.names)
        grids = generator.generate(names, [coder.grid] * len(names), given.guidance, sampling)
        pictures = [torch.from_numpy(np.asarray(coder.picture(grid)).copy()) for grid in grids]
        drawn_NCHW = normalise(torch.stack(pictures).permute(0, 3, 1, 2))
        codes = [coder.encode(_picture(image)) for image in real_NCHW]
        for kind, share in nearest(drawn_NCHW, real_NCHW).items():
            print(f"figure share_drawn_right_{split.value}_by_{kind} {share:.3f} of 1")
        said = likeliest(model, opened, codes, names)
        print(f"figure share_named_right_{split.value} {said:.3f} of 1")
        shown += [real_NCHW[:SHOWN], drawn_NCHW[:SHOWN]]
    if given.sheet is not None:
        sheet(shown).save(given.sheet)


def _picture(image_CHW: Tensor) -> Image.Image:
    return sheet([image_CHW[None]])


if __name__ == "__main__":
    main()
