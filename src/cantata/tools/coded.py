"""Images as codes, for models that read and draw them as tokens: the tokenizer between pixels and codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, Document, Example, Part, Sample
from cantata.data.collate.packed import PackedCollator
from cantata.data.collate.pixels import ImageCollator
from cantata.infer.reconstructions import sheet
from cantata.models.emu3 import Emu3Processor
from cantata.tools.open_model import OpenedModel
from cantata.tools.open_tokenizer import open_tokenizer
from cantata.train.reconstruction import normalise


class Coder:
    """Pixels to codes and back with one tokenizer, at the sizes that a model knows.

    Args:
        path: the tokenizer.
        model: what reads and draws the codes.
        size: (rows, columns) in pixels; None: as the codes that the model trained on.

    Raises `ConfigError` where the model reads no codes, the tokenizer is none, has not as many codes or is
    another one than the model's, or no size is known.
    """

    def __init__(self, path: Path, model: OpenedModel, size: tuple[int, int] | None) -> None:
        learned, wanted = model.codes, _codes_of(model.collator.processor)
        opened = open_tokenizer(path, dist.device())
        if learned is not None and learned.tokenizer != opened.digest:
            raise ConfigError(
                f"{path} is another tokenizer ({opened.digest[:12]}) than the one whose codes the model "
                f"learned ({learned.tokenizer[:12]}); give that one"
            )
        quantizer = opened.model.quantizer
        if (quantizer.num_codebooks, quantizer.num_codes) != (1, wanted):
            raise ConfigError(
                f"{path} has {quantizer.num_codebooks} x {quantizer.num_codes:,} codes, and the model one of "
                f"{wanted:,} at each place (collator.processor.tokens.codebook_size); they must be the same"
            )
        known = [] if learned is None else [(rows, columns) for rows, columns in learned.sizes]
        sizes = known if size is None else [size]
        if not sizes:
            raise ConfigError("the size of images is not known here; add --size ROWSxCOLUMNS, in pixels")
        self.model = opened.model
        self.collator = ImageCollator(sizes, 1, opened.model.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of the first size."""
        _, rows, columns = self.model.grid(1, *self.collator.sizes[0])
        return rows, columns

    @torch.no_grad()
    def encode(self, part: Part) -> Codes:
        """An image or a clip as codes. Raises `DataError` for anything else."""
        pixels = torch.from_numpy(self.collator.pixels(part))[None].to(dist.device())
        return Codes(self.model.encode(normalise(pixels))[0].cpu().numpy())

    @torch.no_grad()
    def picture(self, codes_hw: Any) -> Image.Image:
        """What codes look like."""
        codes = torch.as_tensor(codes_hw, device=dist.device())[None, None]
        return sheet([self.model.decode(codes)[:, 0]])


def _codes_of(processor: Any) -> int:
    """How many codes a model has tokens for."""
    if not isinstance(processor, Emu3Processor):
        raise ConfigError(f"{type(processor).__name__} makes no tokens of images; leave out --tokenizer")
    return processor.tokens.codebook_size


class CodingProcessor:
    """A processor whose images go through a tokenizer first."""

    def __init__(self, inner: Any, coder: Coder) -> None:
        self._inner = inner
        self._coder = coder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """See `core.samples.Processor`."""

        def coded(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(part if isinstance(part, str) else self._coder.encode(part) for part in parts)

        if isinstance(example, Document):
            example = Document(coded(example.parts))
        else:
            example = Chat(tuple(replace(one, parts=coded(one.parts)) for one in example.messages))
        sample: Sample = self._inner.encode_prompt(example, key)
        return sample


def reads_pixels(opened: OpenedModel, coder: Coder) -> OpenedModel:
    """The model with a tokenizer before it."""
    processor = CodingProcessor(opened.collator.processor, coder)
    return replace(opened, collator=PackedCollator(processor), no_images="")
