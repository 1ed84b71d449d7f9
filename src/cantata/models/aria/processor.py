"""Text, images and conversations as Aria reads them.

T  tokens     P  patches
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cantata.core.chat_template import ASSISTANT, weight_of
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, ImagePatches, Part, Video
from cantata.core.types import IMAGE, VIDEO
from cantata.models.aria import crops
from cantata.models.aria.vision import patch_position_ids
from cantata.models.chat_processor import ChatProcessor, Media, to_rgb
from cantata.models.draft import Draft


class TokenNames(NamedTuple):
    """The special tokens, as the tokenizer spells them."""

    image: str
    image_prefix: str
    image_suffix: str
    message_start: str
    message_end: str
    document_end: str
    pad: str


class AriaProcessor(ChatProcessor):
    """Encodes examples for Aria.

    An image becomes `image_prefix`, `features_per_image` placeholders for each of its crops, `image_suffix`;
    a video the same for each of its frames, which are never cut.
    A document ends with `document_end`, which is learned like its text. A conversation is ChatML, or what
    `chat_template` makes of it; of it the model learns what the assistant says, up to and including
    `message_end`, unless a message weighs itself. Around the placeholders of an image stands in a
    conversation what the template writes there.
    Text is only ever text: a sample that spells out a special token does not get that token.

    Args:
        tokenizer: a `tokenizer.json`, or a folder that holds one; `embedded:` names one of the package.
        image_size: length of the longest side, in pixels (490 or 980 as published).
        min_image_size: least length of the other side, in pixels.
        patch_size: side of a patch, in pixels.
        position_grid: side of the tower's grid of learned positions.
        features_per_image: features that the projector makes of a crop (128 at 490, 256 at 980).
        split_image: cut each image into crops of `image_size`, preceded by the whole image.
        resampling: who resizes the images.
        image_token: name of the placeholder.
        image_prefix: name of the token before an image.
        image_suffix: name of the token after it.
        message_start: name of the token that opens a turn.
        message_end: name of the token that closes it.
        document_end: name of the token that ends a document.
        pad_token: name of the padding token.
        chat_template: a Jinja template, or a checkpoint's folder that holds one; null: ChatML, as Aria's.

    Raises `ConfigError` where the file is no tokenizer, a token is not in it, or the sizes do not fit.
    """

    true_positions = False
    """Whether a patch's position is its own row and column; else both are stretched over the whole grid."""

    def __init__(
        self,
        tokenizer: str,
        image_size: int,
        min_image_size: int,
        patch_size: int,
        position_grid: int,
        features_per_image: int,
        split_image: bool,
        resampling: crops.Resampling,
        image_token: str,
        image_prefix: str,
        image_suffix: str,
        message_start: str,
        message_end: str,
        document_end: str,
        pad_token: str,
        chat_template: str | None,
    ) -> None:
        if image_size % patch_size:
            raise ConfigError(f"image_size={image_size} is no multiple of patch_size={patch_size}")
        if not 1 <= min_image_size <= image_size:
            raise ConfigError(
                f"min_image_size={min_image_size} must lie between 1 and image_size={image_size}"
            )
        if features_per_image < 1:
            raise ConfigError(f"features_per_image={features_per_image} must be at least 1")
        super().__init__(tokenizer, image_token, pad_token, (image_prefix, image_suffix), chat_template)
        self.image_size = image_size
        self.min_image_size = min_image_size
        self.patch_size = patch_size
        self.position_grid = position_grid
        self.features_per_image = features_per_image
        self.split_image = split_image
        self.resampling = resampling
        self.token_names = TokenNames(
            image_token, image_prefix, image_suffix, message_start, message_end, document_end, pad_token
        )
        self.patch_values = 3 * patch_size**2
        self._image_prefix, self._image_suffix = self._around_images
        self._message_start = self._id(message_start)
        self._message_end = self._id(message_end)
        self._document_end = self._id(document_end)

    def picture(self, image: ImagePatches) -> Image.Image:
        """The pixels that the vision tower gets, laid out as an image again."""
        rows_P = image.position_ids_P // self.position_grid
        return crops.joined(image.patches_PC, int((rows_P == rows_P[0]).sum()), self.patch_size)

    def _add_document(self, draft: Draft, parts: Sequence[Part], *, is_prompt: bool) -> None:
        self._add_parts(draft, parts, weight=0.0 if is_prompt else 1.0)
        if not is_prompt:
            draft.add([self._document_end], weight=1.0)

    def _add_turns(self, draft: Draft, chat: Chat, *, is_prompt: bool) -> None:
        newline = self._text("\n")
        for message in chat.messages:
            weight = 0.0 if is_prompt else weight_of(message)
            draft.add([self._message_start, *self._text(f"{message.role}\n")], weight=0.0)
            self._add_parts(draft, message.parts, weight=weight)
            draft.add([self._message_end], weight=weight)
            draft.add(newline, weight=0.0)
        if is_prompt:
            draft.add([self._message_start, *self._text(f"{ASSISTANT}\n")], weight=0.0)

    def _add_images(self, draft: Draft, images: list[ImagePatches], modality: int) -> None:
        draft.add([self._image_prefix], weight=0.0)
        self._add_placeholders(draft, images, modality)
        draft.add([self._image_suffix], weight=0.0)

    def _media(self, part: Image.Image | Video | Codes) -> Media:
        """The crops of an image, or of each frame the only one, with their modality."""
        if isinstance(part, Codes):
            raise DataError("image codes", "Aria reads pixels; give it the images themselves")
        if isinstance(part, Video):
            return [([self._patches(frame)], VIDEO) for frame in part.frames]
        return [(self._images(part), IMAGE)]

    def _images(self, image: Image.Image) -> list[ImagePatches]:
        if not self.split_image:
            return [self._patches(image)]
        return [self._patches(crop) for crop in crops.split(to_rgb(image), self.image_size, self.resampling)]

    def _patches(self, crop: Image.Image) -> ImagePatches:
        patches_PC, rows, columns = crops.patches(
            to_rgb(crop), self.image_size, self.min_image_size, self.patch_size, self.resampling
        )
        positions_P = self.position_ids(rows, columns)
        return ImagePatches(patches_PC, positions_P, self.features_per_image)

    def position_ids(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Position ids of an image of so many patches, row by row."""
        return _positions(rows, columns, self.position_grid)


class TruePositionProcessor(AriaProcessor):
    """`AriaProcessor` for a tower that computes positions from a patch's own row and column.

    Args: as of `AriaProcessor`.
    """

    true_positions = True

    def position_ids(self, rows: int, columns: int) -> NDArray[np.int64]:
        """`row * position_grid + column`."""
        return (np.arange(rows)[:, None] * self.position_grid + np.arange(columns)).flatten()


@lru_cache(maxsize=1024)
def _positions(rows: int, columns: int, grid: int) -> NDArray[np.int64]:
    positions: NDArray[np.int64] = np.asarray(patch_position_ids(rows, columns, grid), dtype=np.int64)
    return positions
