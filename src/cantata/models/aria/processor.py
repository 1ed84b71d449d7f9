"""Text, images and conversations as Aria reads them.

T  tokens     P  patches
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from cantata.core.chat_template import ASSISTANT, ChatTemplate, Piece, weight_of
from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import Chat, Codes, DataError, Document, Example, ImagePatches, Part, Sample, Video
from cantata.core.suggest import hint
from cantata.core.types import IMAGE, VIDEO
from cantata.models.aria import crops
from cantata.models.aria.vision import patch_position_ids
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


class AriaProcessor:
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
        self.image_size = image_size
        self.min_image_size = min_image_size
        self.patch_size = patch_size
        self.position_grid = position_grid
        self.features_per_image = features_per_image
        self.split_image = split_image
        self.resampling = resampling
        self.tokenizer = load_tokenizer(tokenizer)
        self.token_names = TokenNames(
            image_token, image_prefix, image_suffix, message_start, message_end, document_end, pad_token
        )
        self.image_token_id = self._id(image_token)
        self.pad_token_id = self._id(pad_token)
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.patch_values = 3 * patch_size**2
        self._image_prefix = self._id(image_prefix)
        self._image_suffix = self._id(image_suffix)
        self._message_start = self._id(message_start)
        self._message_end = self._id(message_end)
        self._document_end = self._id(document_end)
        self.template: ChatTemplate | None = None
        """The chat template, where it is not ChatML."""
        self._template_ids: dict[str, list[int]] = {}
        if chat_template is not None:
            self._load_template(chat_template, load_tokenizer(tokenizer))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._document_end, self._message_end

    def encode(self, example: Example, key: str) -> Sample:
        """A training sample. Raises `DataError` for an unknown role, an image without pixels, or codes."""
        draft = Draft()
        if isinstance(example, Document):
            self._add_parts(draft, example.parts, weight=1.0)
            draft.add([self._document_end], weight=1.0)
        else:
            self._add_chat(draft, example)
        return draft.sample(key)

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """What a generation continues: a document without its end, a chat with the assistant's header."""
        draft = Draft()
        if isinstance(example, Document):
            self._add_parts(draft, example.parts, weight=0.0)
        else:
            self._add_chat(draft, example, add_generation_prompt=True)
        return draft.sample(key)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens spelt out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def picture(self, image: ImagePatches) -> Image.Image:
        """The pixels that the vision tower gets, laid out as an image again."""
        rows_P = image.position_ids_P // self.position_grid
        return crops.joined(image.patches_PC, int((rows_P == rows_P[0]).sum()), self.patch_size)

    def __getstate__(self) -> dict[str, object]:
        # What was encoded is no part of what it is: a cache of samples knows a processor by its pickle.
        return {**self.__dict__, "_template_ids": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        # The flag is no part of tokenizer.json, and so of its pickle.
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def _load_template(self, path: str, tokenizer: Tokenizer) -> None:
        # In what the template writes, a special token spelt out is one.
        tokenizer.encode_special_tokens = False
        self._template_tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        of_images = (self.token_names.image, self.token_names.image_prefix, self.token_names.image_suffix)
        special = [token.content for token in added if token.special and token.content not in of_images]
        self.template = ChatTemplate(path, special)

    def _add_chat(self, draft: Draft, chat: Chat, add_generation_prompt: bool = False) -> None:
        if self.template is not None:
            self._add_templated(draft, chat, self.template.render(chat, add_generation_prompt))
            return
        newline = self._text("\n")
        for message in chat.messages:
            weight = 0.0 if add_generation_prompt else weight_of(message)
            draft.add([self._message_start, *self._text(f"{message.role}\n")], weight=0.0)
            self._add_parts(draft, message.parts, weight=weight)
            draft.add([self._message_end], weight=weight)
            draft.add(newline, weight=0.0)
        if add_generation_prompt:
            draft.add([self._message_start, *self._text(f"{ASSISTANT}\n")], weight=0.0)

    def _add_templated(self, draft: Draft, chat: Chat, pieces: Iterable[Piece]) -> None:
        parts = [part for message in chat.messages for part in message.parts]
        media = [media for part in parts if not isinstance(part, str) for media in self._media(part)]
        rest = iter(media)
        for text, is_template, weight in pieces:
            if not is_template:
                draft.add(self._text(text), weight=weight)
                continue
            for token in self._encode_template(text):
                if token == self.image_token_id:
                    images, modality = next(rest, (None, IMAGE))
                    if images is None:
                        raise DataError(
                            "chat template", f"it has more images than the {len(media)} there are"
                        )
                    self._add_placeholders(draft, images, modality)
                else:
                    is_frame = token in (self._image_prefix, self._image_suffix)
                    draft.add([token], weight=0.0 if is_frame else weight)
        if next(rest, None) is not None:
            raise DataError("chat template", f"it leaves out some of {len(media)} images")

    def _encode_template(self, text: str) -> list[int]:
        # A template writes the same few pieces again and again.
        if text not in self._template_ids:
            ids: list[int] = self._template_tokenizer.encode(text, add_special_tokens=False).ids
            self._template_ids[text] = ids
        return self._template_ids[text]

    def _add_parts(self, draft: Draft, parts: Iterable[Part], weight: float) -> None:
        for part in parts:
            if isinstance(part, str):
                draft.add(self._text(part), weight=weight)
                continue
            for images, modality in self._media(part):
                draft.add([self._image_prefix], weight=0.0)
                self._add_placeholders(draft, images, modality)
                draft.add([self._image_suffix], weight=0.0)

    def _add_placeholders(self, draft: Draft, images: list[ImagePatches], modality: int) -> None:
        placeholders = [self.image_token_id] * sum(image.num_features for image in images)
        draft.add(placeholders, weight=0.0, modality=modality)
        draft.images.extend(images)

    def _media(self, part: Image.Image | Video | Codes) -> list[tuple[list[ImagePatches], int]]:
        """The crops of an image, or of each frame the only one, with their modality."""
        if isinstance(part, Codes):
            raise DataError("image codes", "Aria reads pixels; give it the images themselves")
        if isinstance(part, Video):
            return [([self._patches(frame)], VIDEO) for frame in part.frames]
        return [(self._images(part), IMAGE)]

    def _images(self, image: Image.Image) -> list[ImagePatches]:
        if not self.split_image:
            return [self._patches(image)]
        return [self._patches(crop) for crop in crops.split(_rgb(image), self.image_size, self.resampling)]

    def _patches(self, crop: Image.Image) -> ImagePatches:
        patches_PC, rows, columns = crops.patches(
            _rgb(crop), self.image_size, self.min_image_size, self.patch_size, self.resampling
        )
        positions_P = self.position_ids(rows, columns)
        return ImagePatches(patches_PC, positions_P, self.features_per_image)

    def position_ids(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Position ids of an image of so many patches, row by row."""
        return _positions(rows, columns, self.position_grid)

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            special = [added.content for added in self.tokenizer.get_added_tokens_decoder().values()]
            raise ConfigError(f"the tokenizer has no token {token!r}{hint(token, special)}")
        return int(found)


class TruePositionProcessor(AriaProcessor):
    """`AriaProcessor` for a tower that computes positions from a patch's own row and column.

    Args: as of `AriaProcessor`.
    """

    true_positions = True

    def position_ids(self, rows: int, columns: int) -> NDArray[np.int64]:
        """`row * position_grid + column`."""
        return (np.arange(rows)[:, None] * self.position_grid + np.arange(columns)).flatten()


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer that takes text literally: special tokens spelt out in it stay text.

    Raises `ConfigError` where `path` is neither a tokenizer.json nor a folder with one.
    """
    found = asset(path)
    file = found / "tokenizer.json" if found.is_dir() else found
    if not file.is_file():
        raise ConfigError(f"{path}: the folder holds no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} is no tokenizer.json: {error}") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=1024)
def _positions(rows: int, columns: int, grid: int) -> NDArray[np.int64]:
    positions: NDArray[np.int64] = np.asarray(patch_position_ids(rows, columns, grid), dtype=np.int64)
    return positions
