"""`cantata probe MODEL`: how well classes of held-out images can be told from a frozen AIMv2 encoder.

An attentive probe learns on the other images. With --zero-shot nothing is learned: the class whose name, put
into a text, is nearest to the image counts; that wants a contrastive model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.core.samples import DataError, Document
from cantata.data.sources import CaptionedImages
from cantata.data.split import Split
from cantata.infer.probe import Labelled, ProbeSettings, probe_accuracy, zero_shot_accuracy
from cantata.models.aimv2 import Aimv2PairProcessor
from cantata.models.aimv2.processor import PatchReader
from cantata.tools.arguments import Parser
from cantata.tools.open_encoder import OpenedEncoder, open_encoder

LABEL = "{label}"


class Classes(NamedTuple):
    """Images of a file by the values of a column."""

    names: list[str]
    train: Labelled
    test: Labelled


def read_classes(
    path: str, image_column: str, label: str, held_out_share: float, reader: PatchReader
) -> Classes:
    """Images and classes of a parquet file; `ConfigError` where it cannot be read or nothing is left."""
    parts = []
    for split in (Split.train, Split.held_out):
        dataset = CaptionedImages(path, image_column, f"{{{label}}}", split, held_out_share)
        found = []
        for index in range(len(dataset)):
            try:
                example = dataset[index]
                assert isinstance(example, Document)
                image, name = example.parts
                assert isinstance(image, Image.Image)
                found.append((reader.patches(image), str(name)))
            except DataError as error:
                raise ConfigError(f"{path}: row {index} of {split.value}: {error}") from error
        if not found:
            raise ConfigError(
                f"{path}: no image is in {split.value}; change --held-out-share={held_out_share}"
            )
        parts.append(found)
    names = sorted({name for part in parts for _, name in part})
    number = {name: place for place, name in enumerate(names)}
    labelled = [
        Labelled([image for image, _ in part], torch.tensor([number[name] for _, name in part]))
        for part in parts
    ]
    return Classes(names, *labelled)


def measure(opened: OpenedEncoder, classes: Classes, zero_shot: str | None, settings: ProbeSettings) -> float:
    """Accuracy on the held-out images; raises `ConfigError` where the model cannot be asked so."""
    device = dist.device()
    if zero_shot is None:
        heads = opened.vision.num_attention_heads
        parts = (classes.train, classes.test, len(classes.names))
        return probe_accuracy(opened.tower, heads, *parts, settings, device)
    if opened.pairs is None or not isinstance(opened.reader, Aimv2PairProcessor):
        raise ConfigError(
            "--zero-shot wants a contrastive model with its tokenizer; this is an encoder alone"
        )
    if LABEL not in zero_shot:
        raise ConfigError(f"--zero-shot {zero_shot!r} has no {LABEL} in it")
    try:
        texts = [opened.reader.text_ids(zero_shot.replace(LABEL, name)) for name in classes.names]
    except DataError as error:
        raise ConfigError(f"--zero-shot {zero_shot!r}: {error}") from error
    return zero_shot_accuracy(opened.pairs, texts, classes.test, device)


def main(arguments: Sequence[str]) -> int:
    """The command; raises `ConfigError` for a model or a file that cannot be used."""
    parser = Parser(prog="cantata probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a run, a checkpoint, or a Hugging Face folder"
    )
    parser.add_argument(
        "--data", default="embedded:twemoji.parquet", metavar="FILE", help="a parquet file (%(default)s)"
    )
    parser.add_argument("--image-column", default="image", help="of encoded images (%(default)s)")
    parser.add_argument("--label", default="group", help="column of classes (%(default)s)")
    parser.add_argument("--held-out-share", type=float, default=0.05, help="of the rows (%(default)s)")
    parser.add_argument("--zero-shot", metavar="TEXT", help=f"ask by text, such as 'a picture of {LABEL}'")
    parser.add_argument("--steps", type=int, default=500, help="of the probe (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the probe (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of the probe (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the probe (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    given = parser.parse_args(list(arguments))
    for name in ("steps", "batch_size"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(given, name)} must be at least 1")
    opened = open_encoder(given.model, dist.device())
    classes = read_classes(given.data, given.image_column, given.label, given.held_out_share, opened.reader)
    settings = ProbeSettings(given.steps, given.batch_size, given.lr, given.weight_decay, given.seed)
    shown = {
        "accuracy": measure(opened, classes, given.zero_shot, settings),
        "majority": classes.test.majority(),
        "classes": len(classes.names),
        "train_images": len(classes.train.images),
        "test_images": len(classes.test.images),
    }
    if given.json:
        print(json.dumps(shown, indent=2))
        return 0
    way = "an attentive probe" if given.zero_shot is None else f"zero shot by {given.zero_shot!r}"
    print(f"{given.model}: {shown['accuracy']:.1%} of {shown['test_images']} held-out images by {way}")
    print(
        f"  {shown['classes']} classes of {given.label}; always saying the commonest: {shown['majority']:.1%}"
    )
    return 0
