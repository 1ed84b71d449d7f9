"""Text, images and conversations as Mllama reads them.

T  tokens     P  patches
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cantata.core.chat_template import ASSISTANT, weight_of
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, ImagePatches, Part, Video
from cantata.core.types import IMAGE, VIDEO
from cantata.models.chat_processor import ChatProcessor, Media, to_rgb
from cantata.models.draft import Draft
from cantata.models.mllama import tiles


class TokenNames(NamedTuple):
    """The special tokens, as the tokenizer spells them."""

    image: str
    begin: str
    header_start: str
    header_end: str
    message_end: str
    document_end: str
    pad: str


class MllamaProcessor(ChatProcessor):
    """Encodes examples for Mllama.

    An image, or a frame of a video, is one token, `image_token`; its tiles go to the cross-attention layers.
    A document is `begin_token`, its text and images, `document_end`, which is learned like its text; images
    that it begins with stand before `begin_token`. A conversation is Llama 3's, `begin_token` and for each
    turn `header_start`, the role, `header_end`, two newlines, what is said, `message_end`; or what
    `chat_template` makes of it. Of it the model learns what the assistant says, up to and including
    `message_end`, unless a message weighs itself.

    Args:
        tokenizer: a `tokenizer.json`, or a folder that holds one; `embedded:` names one of the package.
        image_size: side of a tile, in pixels (560 as published).
        max_num_tiles: most tiles that an image becomes.
        patch_size: side of a patch, in pixels.
        image_token: name of the placeholder.
        begin_token: name of the token that every sample has first.
        header_start: name of the token before a turn's role.
        header_end: name of the token after it.
        message_end: name of the token that closes a turn.
        document_end: name of the token that ends a document.
        pad_token: name of the padding token.
        chat_template: a Jinja template, or a checkpoint's folder that holds one; null: as Llama 3's.

    Raises `ConfigError` where the file is no tokenizer, a token is not in it, or the sizes do not fit.
    """

    def __init__(
        self,
        tokenizer: str,
        image_size: int,
        max_num_tiles: int,
        patch_size: int,
        image_token: str,
        begin_token: str,
        header_start: str,
        header_end: str,
        message_end: str,
        document_end: str,
        pad_token: str,
        chat_template: str | None,
    ) -> None:
        if image_size % patch_size:
            raise ConfigError(f"image_size={image_size} is no multiple of patch_size={patch_size}")
        if max_num_tiles < 1:
            raise ConfigError(f"max_num_tiles={max_num_tiles} must be at least 1")
        super().__init__(tokenizer, image_token, pad_token, (), chat_template)
        self.image_size = image_size
        self.max_num_tiles = max_num_tiles
        self.patch_size = patch_size
        self.patch_values = 3 * patch_size**2
        self.token_names = TokenNames(
            image_token, begin_token, header_start, header_end, message_end, document_end, pad_token
        )
        self._begin = self._id(begin_token)
        self._header_start = self._id(header_start)
        self._header_end = self._id(header_end)
        self._message_end = self._id(message_end)
        self._document_end = self._id(document_end)

    def picture(self, image: ImagePatches) -> Image.Image:
        """The canvas of tiles that the vision tower gets, laid out as an image again."""
        canvas_id = int(image.position_ids_P[0]) // (self.max_num_tiles * self._patches)
        canvas = tiles.canvases(self.max_num_tiles)[canvas_id - 1]
        return tiles.joined(image.patches_PC, canvas, self.image_size, self.patch_size)

    def _add_document(self, draft: Draft, parts: Sequence[Part], *, is_prompt: bool) -> None:
        weight = 0.0 if is_prompt else 1.0
        first = list(takewhile(lambda part: not isinstance(part, str), parts))
        self._add_parts(draft, first, weight=weight)
        draft.add([self._begin], weight=0.0)
        self._add_parts(draft, parts[len(first) :], weight=weight)
        if not is_prompt:
            draft.add([self._document_end], weight=weight)

    def _add_turns(self, draft: Draft, chat: Chat, *, is_prompt: bool) -> None:
        draft.add([self._begin], weight=0.0)
        for message in chat.messages:
            weight = 0.0 if is_prompt else weight_of(message)
            draft.add(self._header(message.role), weight=0.0)
            self._add_parts(draft, message.parts, weight=weight)
            draft.add([self._message_end], weight=weight)
        if is_prompt:
            draft.add(self._header(ASSISTANT), weight=0.0)

    def _add_images(self, draft: Draft, images: list[ImagePatches], modality: int) -> None:
        self._add_placeholders(draft, images, modality)

    def _media(self, part: Image.Image | Video | Codes) -> Media:
        """An image, or each frame of a clip, by itself."""
        if isinstance(part, Codes):
            raise DataError("image codes", "Mllama reads pixels; give it the images themselves")
        if isinstance(part, Video):
            return [([self._tiles(frame)], VIDEO) for frame in part.frames]
        return [([self._tiles(part)], IMAGE)]

    def _tiles(self, image: Image.Image) -> ImagePatches:
        most, size = self.max_num_tiles, self.image_size
        patches_PC, canvas = tiles.tile_patches(to_rgb(image), most, size, self.patch_size)
        canvas_id = 1 + tiles.canvases(most).index(canvas)
        first = canvas_id * most * self._patches
        return ImagePatches(patches_PC, _positions(first, len(patches_PC)), 1)

    @property
    def _patches(self) -> int:
        """Of a tile."""
        return (self.image_size // self.patch_size) ** 2

    def _header(self, role: str) -> list[int]:
        return [self._header_start, *self._text(role), self._header_end, *self._text("\n\n")]


@lru_cache(maxsize=64)
def _positions(first: int, count: int) -> NDArray[np.int64]:
    return np.arange(first, first + count, dtype=np.int64)
