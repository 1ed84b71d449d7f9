"""Changing the pictures of a training sample, the same way wherever and whenever the sample is read.

What is drawn is a function of the run's seed, the sample and its epoch, so any worker, rank or resumed run
makes the same pixels, and each epoch new ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageEnhance

from cantata.core.errors import ConfigError
from cantata.core.samples import Codes, Document, Example, Part, Video


class Augment(Protocol):
    """What an `augment:` slot must build; it travels to worker processes, so it must pickle."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A changed copy. What is drawn must not depend on the image: frames of a clip share their draws."""
        ...


@runtime_checkable
class ExampleAugment(Protocol):
    """What an `augment:` slot may build instead: it changes the example as a whole."""

    def change(self, example: Example, rng: np.random.Generator) -> Example: ...


@dataclass(frozen=True)
class NullPrompt:
    """Leaves a document's texts out now and then, so that a model learns images without a text too.

    Classifier-free guidance compares with what it then draws (Ho and Salimans, 2022, arXiv:2207.12598).
    """

    share: float
    """Probability; Emu3's authors take 0.05."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"augment.share={self.share} must be from 0 to 1")

    def change(self, example: Example, rng: np.random.Generator) -> Example:
        if not isinstance(example, Document) or rng.random() >= self.share:
            return example
        return replace(example, parts=tuple(part for part in example.parts if not isinstance(part, str)))


@dataclass(frozen=True)
class Draw:
    """What decides the changes of a sample."""

    seed: int
    """The run's."""
    source: str
    index: int
    """Of the sample in its source."""
    epoch: int
    """How often the source has been passed before."""

    def generator(self, part: int) -> np.random.Generator:
        """Random numbers for the sample's `part`-th picture or clip; the same on every machine."""
        text = json.dumps([self.seed, self.source, self.index, self.epoch, part])
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def augmented(example: Example, augment: Augment | ExampleAugment, draw: Draw) -> Example:
    """The example with each picture changed by a draw of its own; a clip's frames all by the same one.

    Codes stay as they are.
    """
    if isinstance(augment, ExampleAugment):
        return augment.change(example, draw.generator(0))
    count = 0

    def changed(part: Part) -> Part:
        nonlocal count
        if isinstance(part, (str, Codes)):
            return part
        number, count = count, count + 1
        if isinstance(part, Video):
            return Video(tuple(augment(frame, draw.generator(number)) for frame in part.frames))
        return augment(part, draw.generator(number))

    if isinstance(example, Document):
        return replace(example, parts=tuple(changed(part) for part in example.parts))
    messages = (
        replace(message, parts=tuple(changed(part) for part in message.parts)) for message in example.messages
    )
    return replace(example, messages=tuple(messages))


@dataclass(frozen=True)
class CropFlipJitter:
    """A random crop brought back to the image's size, a flip, and changed colours, in this order.

    The size stays, so a sample has as many tokens as without. Each change is off at the value said.
    """

    min_area: float
    """Share of the area that a crop keeps at least, drawn evenly up to 1; 1: no crop."""
    max_stretch: float
    """How much wider or narrower than the image a crop may be, drawn evenly in the logarithm; 1: never."""
    flip: float
    """Probability of a mirror image, 0 to 1. Text in images and words such as "left" do not survive it."""
    brightness: float
    """Factors of brightness, contrast and saturation are drawn evenly from 1 - value to 1 + value; 0: off."""
    contrast: float
    saturation: float
    hue: float
    """Turn of the colour circle, drawn evenly from -value to value; 0.5 is half a turn, 0: off."""

    def __post_init__(self) -> None:
        limits = {"min_area": (0.01, 1), "max_stretch": (1, 10), "flip": (0, 1), "hue": (0, 0.5)}
        limits |= dict.fromkeys(("brightness", "contrast", "saturation"), (0, 1))
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"augment.{name}={getattr(self, name)} must be from {least} to {most}")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        # One fixed row of numbers: switching a change off leaves the others as they were.
        area, stretch, left, top, flip, brightness, contrast, saturation, hue = rng.random(9)
        image = self._crop(image, area, stretch, left, top)
        if flip < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.brightness:
            image = ImageEnhance.Brightness(image).enhance(_factor(self.brightness, brightness))
        if self.contrast:
            image = ImageEnhance.Contrast(image).enhance(_factor(self.contrast, contrast))
        if self.saturation:
            image = ImageEnhance.Color(image).enhance(_factor(self.saturation, saturation))
        if self.hue:
            image = _turn_hue(image, round(255 * self.hue * (2 * hue - 1)))
        return image

    def _crop(self, image: Image.Image, area: float, stretch: float, left: float, top: float) -> Image.Image:
        share = 1 - area * (1 - self.min_area)
        ratio = math.exp((2 * stretch - 1) * math.log(self.max_stretch))
        width = image.width * min(1.0, math.sqrt(share * ratio))
        height = image.height * min(1.0, math.sqrt(share / ratio))
        if (width, height) == image.size:
            return image
        x, y = left * (image.width - width), top * (image.height - height)
        box = (x, y, x + width, y + height)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


@dataclass(frozen=True)
class RandomArea:
    """Scales an image, its shape kept, to an area of 2^n patches, as AIMv2's native stage does.

    n is drawn so that each area gets the same share of the patches, as batches of one area and of one number
    of patches give it (Fini et al., 2024, arXiv:2411.14402): small areas come more often. Rows hold a fixed
    number of tokens, so areas may meet in one batch.
    """

    patch_size: int
    """Side of a patch, in pixels."""
    least_log2: int
    """Least n; 7 as published."""
    most_log2: int
    """Largest n; 12 as published."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or not 0 <= self.least_log2 <= self.most_log2 <= 20:
            raise ConfigError(
                f"augment: patch_size={self.patch_size} must be at least 1, and least_log2={self.least_log2} "
                f"to most_log2={self.most_log2} a range from 0 to 20"
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        powers = np.arange(self.least_log2, self.most_log2 + 1)
        chances = 0.5**powers
        area = 2.0 ** rng.choice(powers, p=chances / chances.sum()) * self.patch_size**2
        scale = math.sqrt(area / (image.width * image.height))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.BICUBIC)


def _factor(reach: float, number: float) -> float:
    return 1 + reach * (2 * number - 1)


def _turn_hue(image: Image.Image, steps: int) -> Image.Image:
    """Pillow counts hue in 256 steps."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
