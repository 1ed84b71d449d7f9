"""Images and captions as AIMv2 reads them: in one sequence for pretraining, else in pairs.

P  patches    C  values of a patch
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from cantata.core.errors import ConfigError
from cantata.core.samples import (
    Codes,
    DataError,
    Document,
    Example,
    ImagePatches,
    Part,
    Processor,
    Sample,
    Video,
)
from cantata.core.types import IMAGE, VIDEO
from cantata.models.aimv2.config import Aimv2VisionConfig
from cantata.models.aria.crops import joined
from cantata.models.chat_processor import load_tokenizer, text_ids, token_id
from cantata.models.draft import Draft

CHANNELS = 3


def native_grid(width: int, height: int, patch_size: int, max_patches: int, grid: int) -> tuple[int, int]:
    """Rows and columns of patches of an image that keeps its size, as nearly as whole patches can.

    A larger one is scaled down, its shape kept, to at most `max_patches` patches and `grid` along a side.
    """
    rows, columns = height / patch_size, width / patch_size
    scale = min(1.0, math.sqrt(max_patches / (rows * columns)), grid / max(rows, columns))
    found = [max(1, round(side * scale)) for side in (rows, columns)]
    # Rounding up both sides may be too much; the longer one gives way.
    while found[0] * found[1] > max_patches:
        found[found.index(max(found))] -= 1
    return found[0], found[1]


def check_images(vision: Aimv2VisionConfig, processor: Processor) -> None:
    """Raise `ConfigError` where `collator.processor` makes images that an encoder cannot read."""
    wanted: dict[str, tuple[object, object, str]] = {
        "patch_size": (processor.patch_values, vision.patch_values, "values of a patch"),
    }
    if isinstance(processor, Aimv2Processor):
        wanted["image_size"] = (processor.grid, vision.grid, "model.vision.image_size / patch_size")
        wanted["is_native"] = (processor.is_native, vision.is_native, "model.vision.is_native")
    for key, (found, needed, source) in wanted.items():
        if found != needed:
            raise ConfigError(f"collator.processor.{key} gives {found}; the model needs {needed} ({source})")


class PatchReader:
    """Cuts images into patches, one feature each.

    Args:
        image_size: pixels of a side, to which images are scaled and cropped; of native ones the longest side.
        patch_size: side of a patch, in pixels.
        is_native: keep images' sizes and shapes, as nearly as whole patches can; else they become squares.
        max_patches: patches of an image at most; a larger native one is scaled down.

    Raises `ConfigError` where the sizes do not fit.
    """

    def __init__(self, image_size: int, patch_size: int, is_native: bool, max_patches: int) -> None:
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ConfigError(f"image_size={image_size} is no multiple of patch_size={patch_size}")
        self.grid = image_size // patch_size
        least = 1 if is_native else self.grid**2
        if max_patches < least:
            raise ConfigError(f"max_patches={max_patches} must be at least {least}")
        self.patch_size = patch_size
        self.is_native = is_native
        self.max_patches = max_patches
        self.patch_values = CHANNELS * patch_size**2

    def picture(self, image: ImagePatches) -> Image.Image:
        """The pixels that the encoder gets, laid out as an image again."""
        rows_P = image.position_ids_P // self.grid
        return joined(image.patches_PC, int((rows_P == rows_P[0]).sum()), self.patch_size)

    def patches(self, image: Image.Image) -> ImagePatches:
        """An image cut into patches, one feature each. Raises `DataError` for one without pixels."""
        if not image.width or not image.height:
            raise DataError("corrupt image", "it has no pixels")
        image = image if image.mode == "RGB" else image.convert("RGB")
        rows, columns = self.grid, self.grid
        if self.is_native:
            rows, columns = native_grid(*image.size, self.patch_size, self.max_patches, self.grid)
        size = self.patch_size
        if self.is_native:
            image = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
        else:
            image = ImageOps.fit(image, (columns * size, rows * size), Image.Resampling.BICUBIC)
        blocks = np.asarray(image).reshape(rows, size, columns, size, CHANNELS).transpose(0, 2, 4, 1, 3)
        patches_PC = np.array(blocks, order="C").reshape(rows * columns, self.patch_values)
        positions = np.arange(rows)[:, None] * self.grid + np.arange(columns)
        return ImagePatches(patches_PC, positions.flatten(), len(patches_PC))


class Aimv2Processor(PatchReader):
    """Encodes documents for pretraining: an image becomes a placeholder for every patch, then comes the text.

    The text ends with `document_end`. Its tokens weigh alike and 1 together, so that the loss is a mean over
    samples of means over their tokens, as the paper's. Text is only ever text: a sample that spells out a
    special token does not get that token. Conversations are refused.

    Args:
        tokenizer: a `tokenizer.json`, or a folder that holds one; `embedded:` names one of the package.
        image_size, patch_size, is_native, max_patches: as of `PatchReader`.
        image_token_id: of the placeholder: a special token of the tokenizer, or one that it does not have.
        document_end: name of the token that ends a text.
        pad_token: name of the padding token.

    Raises `ConfigError` where the file is no tokenizer, a token is not in it, or the sizes do not fit.
    """

    def __init__(
        self,
        tokenizer: str,
        image_size: int,
        patch_size: int,
        is_native: bool,
        max_patches: int,
        image_token_id: int,
        document_end: str,
        pad_token: str,
    ) -> None:
        super().__init__(image_size, patch_size, is_native, max_patches)
        self.tokenizer = load_tokenizer(tokenizer)
        self.end, self.pad = document_end, pad_token
        self.pad_token_id = token_id(self.tokenizer, pad_token)
        self._end_id = token_id(self.tokenizer, document_end)
        self.image_token_id = image_token_id
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        special = self.tokenizer.get_added_tokens_decoder()
        if 0 <= image_token_id < size and image_token_id not in special:
            spelt = self.tokenizer.id_to_token(image_token_id)
            raise ConfigError(
                f"image_token_id={image_token_id} is {spelt!r}, ordinary text; take {size} or a special token"
            )
        self.vocab_size = max(size, image_token_id + 1)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self._end_id,)

    def encode(self, example: Example, key: str) -> Sample:
        """A training sample. Raises `DataError` for conversations, codes and images without pixels."""
        parts = self._parts(example)
        ids = [text_ids(self.tokenizer, part) if isinstance(part, str) else [] for part in parts]
        return self._sample(parts, ids, key, weight=1.0 / (1 + sum(map(len, ids))), end=True)

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """The same without its end, ready to be continued."""
        parts = self._parts(example)
        ids = [text_ids(self.tokenizer, part) if isinstance(part, str) else [] for part in parts]
        return self._sample(parts, ids, key, weight=0.0, end=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens spelt out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def __setstate__(self, state: dict[str, object]) -> None:
        # The flag is no part of tokenizer.json, and so of its pickle.
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def _parts(self, example: Example) -> tuple[Part, ...]:
        if not isinstance(example, Document):
            raise DataError("a conversation", "AIMv2 learns from images and what is said of them")
        return example.parts

    def _sample(
        self, parts: Sequence[Part], ids: Sequence[list[int]], key: str, *, weight: float, end: bool
    ) -> Sample:
        draft = Draft()
        for part, tokens in zip(parts, ids, strict=True):
            if isinstance(part, str):
                draft.add(tokens, weight=weight)
                continue
            modality = VIDEO if isinstance(part, Video) else IMAGE
            for image in self._images(part):
                draft.add([self.image_token_id] * image.num_features, weight=0.0, modality=modality)
                draft.images.append(image)
        if end:
            draft.add([self._end_id], weight=weight)
        return draft.sample(key)

    def _images(self, part: Image.Image | Video | Codes) -> list[ImagePatches]:
        if isinstance(part, Codes):
            raise DataError("image codes", "AIMv2 reads pixels; give it the images themselves")
        return [self.patches(frame) for frame in (part.frames if isinstance(part, Video) else (part,))]


class Aimv2PairProcessor(Aimv2Processor):
    """Encodes documents of one image and its text for the contrastive model.

    The text stands between `text_begin` and `text_end`. Nothing of it is predicted: the target at its end
    counts the pair, so that a step's loss is a mean over pairs.

    Args:
        tokenizer, image_size, patch_size, is_native, max_patches, pad_token: as of `Aimv2Processor`.
        text_begin: name of the token before a text.
        text_end: name of the token after it.
        max_length: tokens of a text at most, its first and last included; a longer one is left out.

    Raises `ConfigError` as `Aimv2Processor`.
    """

    def __init__(
        self,
        tokenizer: str,
        image_size: int,
        patch_size: int,
        is_native: bool,
        max_patches: int,
        text_begin: str,
        text_end: str,
        pad_token: str,
        max_length: int,
    ) -> None:
        images = (image_size, patch_size, is_native, max_patches)
        super().__init__(tokenizer, *images, -1, text_end, pad_token)
        if max_length < 3:
            raise ConfigError(f"max_length={max_length} must be at least 3")
        self.begin = text_begin
        self.max_length = max_length
        self._begin_id = token_id(self.tokenizer, text_begin)

    def encode(self, example: Example, key: str) -> Sample:
        """A pair. Raises `DataError` unless there is one image and a text that is short enough."""
        parts = self._parts(example)
        visual = [part for part in parts if isinstance(part, Image.Image)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(visual) != 1 or len(visual) + len(texts) != len(parts):
            raise DataError("not one image", f"a pair holds one image and text, this one {len(visual)}")
        draft = Draft()
        draft.images.append(self.patches(visual[0])._replace(num_features=0))
        draft.add(self.text_ids(" ".join(texts)), weight=0.0)
        draft.weights[-1] = 1.0
        return draft.sample(key)

    def text_ids(self, text: str) -> list[int]:
        """A text's tokens, first and last included. Raises `DataError` for an empty or too long one."""
        ids = text_ids(self.tokenizer, text)
        if not ids:
            raise DataError("no text", "a pair needs an image and a text")
        if len(ids) + 2 > self.max_length:
            raise DataError("long text", f"{len(ids) + 2} tokens, {self.max_length} at most")
        return [self._begin_id, *ids, self._end_id]
