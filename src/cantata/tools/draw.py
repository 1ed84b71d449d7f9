"""What `cantata generate --out image.png` does: pictures from texts, drawn code by code."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.infer.image_generation import ImageGenerator
from cantata.infer.sampling import SamplingConfig
from cantata.tools.coded import Coder
from cantata.tools.export import DTYPES
from cantata.tools.open_model import load, open_model

GUIDANCE = 3.0
"""How much the text counts, unless the command says."""


def draw(given: argparse.Namespace, prompts: list[str], config: SamplingConfig) -> int:
    """Draw an image for each prompt and save it; returns 0.

    Raises `ConfigError` for a model that draws no images, a tokenizer that is not its own, a size that they
    cannot take, or files that are there already.
    """
    if given.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {given.out}: images are written as PNG; write *.png")
    files = _files(given.out, len(prompts))
    there = [str(file) for file in files if file.exists()]
    if there:
        raise ConfigError(f"--out {there[0]} exists already; remove it or name another file")
    if given.tokenizer is None:
        raise ConfigError(
            "--out needs the image tokenizer whose codes the model learned; add --tokenizer DIR"
        )
    opened = open_model(given.model, given.adapter, merge=given.merge)
    for note in opened.notes:
        sys.stderr.write(f"note: {note}\n")
    coder = Coder(given.tokenizer, opened, given.size)
    device = dist.device()
    guidance = GUIDANCE if given.guidance is None else given.guidance
    model = load(opened, device, DTYPES[given.dtype or ("bf16" if device.type == "cuda" else "fp32")])
    generator = ImageGenerator(
        model, opened.collator, max_positions=opened.max_positions, max_open=given.batch_size
    )
    began = time.perf_counter()
    grids = generator.generate(prompts, [coder.grid] * len(prompts), guidance, config)
    seconds = time.perf_counter() - began
    for file, grid in zip(files, grids, strict=True):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            coder.picture(grid).save(file)
        except OSError as error:
            raise ConfigError(f"--out {file}: cannot be written ({error})") from error
    rows, columns = coder.grid
    sys.stderr.write(
        f"{len(files)} images of {rows} x {columns} codes in {seconds:.1f} s: "
        f"{', '.join(map(str, files[:4]))}{', ...' if len(files) > 4 else ''}\n"
    )
    return 0


def _files(out: Path, count: int) -> list[Path]:
    """`image.png`, or of several `image-1.png`, `image-2.png`, ..."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, count + 1)]


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """What concerns images as codes."""
    images = parser.add_argument_group("images as codes (Emu3)")
    images.add_argument("--out", metavar="FILE", type=Path, help="draw an image after each prompt, as PNG")
    images.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=Path,
        help="a run of cantata vq, or an exported folder",
    )
    images.add_argument(
        "--size", metavar="ROWSxCOLUMNS", type=_size, help="of images, in pixels (default: as in training)"
    )
    images.add_argument(
        "--guidance",
        metavar="G",
        type=float,
        help=f"how much the text counts in drawing ({GUIDANCE}); 1: no guidance, twice as fast",
    )


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512x768, rows before columns")
    return int(rows), int(columns)
