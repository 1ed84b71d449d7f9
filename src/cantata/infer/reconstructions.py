"""Pictures of held-out images beside their reconstructions, while a tokenizer trains.

B  images    T  frames    C  channels    H, W  rows and columns
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cantata.core import dist
from cantata.core.samples import DataError, PixelSample
from cantata.core.types import PixelBatch
from cantata.data.held_out import HeldOut
from cantata.train.engine import Engine
from cantata.train.evaluate import Shown
from cantata.train.reconstruction import normalise

COUNT = 16
GAP = 2


class Reconstructions:
    """Keeps `<out>/samples/step-<step>.png`: held-out images above what the codes make of them.

    Of a clip the first frame is shown. Each call is a collective: every rank runs the same images, so that
    sharded parameters are gathered in step.
    """

    def __init__(self, held_out: HeldOut, out: Path) -> None:
        self._out = out
        self._batch = _first_images(held_out)

    @torch.no_grad()
    def __call__(self, step: int, engine: Engine) -> Shown:
        """Reconstruct, write the picture, and say where."""
        if self._batch is None:
            return Shown({}, [])
        model = engine.model
        model.eval()
        real_BTCHW = normalise(self._batch.pixels_BTCHW.to(dist.device()))
        made_BTCHW = model(real_BTCHW).reconstruction_BTCHW
        model.train()
        path = self._out / "samples" / f"step-{step:08d}.png"
        if dist.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet([real_BTCHW[:, 0], made_BTCHW[:, 0]]).save(path)
        return Shown({}, [f"  reconstructions: {path}"])


def sheet(rows: list[Tensor]) -> Image.Image:
    """Rows of images (B, C, H, W) from -1 to 1 as one picture, folded after `COUNT` columns."""
    count, _, height, width = rows[0].shape
    columns = min(count, COUNT)
    folds = -(-count // columns)
    size = (columns * (width + GAP) - GAP, folds * len(rows) * (height + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    for place, row_BCHW in enumerate(rows):
        pixels = (row_BCHW.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()
        for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            fold, column = divmod(index, columns)
            at = (column * (width + GAP), (fold * len(rows) + place) * (height + GAP))
            canvas.paste(Image.fromarray(image), at)
    return canvas


def _first_images(held_out: HeldOut) -> PixelBatch | None:
    """Up to `COUNT` readable samples of the first one's size, spread over the first source that has any."""
    samples: list[PixelSample] = []
    for name, index, example in held_out.spread(2 * COUNT):
        try:
            samples.append(held_out.collator.encode(example, f"{name}:{index}"))
        except DataError:
            continue
    alike = list(islice((one for one in samples if one.size == samples[0].size), COUNT))
    if not alike:
        return None
    batch: PixelBatch = held_out.collator.collate([held_out.collator.row(alike)], len(alike))
    return batch
