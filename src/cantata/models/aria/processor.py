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

from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import Chat, DataError, Document, Example, ImagePatches, Part, Sample, Video
from cantata.core.suggest import hint
from cantata.core.types import IMAGE, TEXT, VIDEO
from cantata.models.aria import crops
from cantata.models.aria.vision import patch_position_ids

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")


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
    A document ends with `document_end`, which is learned like its text. A conversation is ChatML; of it the
    model learns what the assistant says, up to and including `message_end`, unless a message weighs itself.
    Text is only ever text: a document that spells out a special token does not get that token.

    Args:
        tokenizer: a `tokenizer.json`, or a folder that holds one; `embedded:` names one of the package.
        image_size: length of the longest side, in pixels (490 or 980 as published).
        min_image_size: least length of the other side, in pixels.
        patch_size: side of a patch, in pixels.
        position_grid: side of the tower's grid of learned positions.
        features_per_image: features that the projector makes of a crop (128 at 490, 256 at 980).
        split_image: cut each image into crops of `image_size`, preceded by the whole image.
        image_token: name of the placeholder.
        image_prefix: name of the token before an image.
        image_suffix: name of the token after it.
        message_start: name of the token that opens a turn.
        message_end: name of the token that closes it.
        document_end: name of the token that ends a document.
        pad_token: name of the padding token.

    Raises `ConfigError` where the file is no tokenizer, a token is not in it, or the sizes do not fit.
    """

    def __init__(
        self,
        tokenizer: str,
        image_size: int,
        min_image_size: int,
        patch_size: int,
        position_grid: int,
        features_per_image: int,
        split_image: bool,
        image_token: str,
        image_prefix: str,
        image_suffix: str,
        message_start: str,
        message_end: str,
        document_end: str,
        pad_token: str,
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

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._document_end, self._message_end

    def encode(self, example: Example, key: str) -> Sample:
        """A training sample. Raises `DataError` for an unknown role or an image without pixels."""
        draft = _Draft()
        if isinstance(example, Document):
            self._add_parts(draft, example.parts, weight=1.0)
            draft.add([self._document_end], weight=1.0)
        else:
            self._add_chat(draft, example)
        return draft.sample(key)

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """What a generation continues: a document without its end, a chat with the assistant's header."""
        draft = _Draft()
        if isinstance(example, Document):
            self._add_parts(draft, example.parts, weight=0.0)
        else:
            self._add_chat(draft, example)
            draft.add([self._message_start, *self._text(f"{ASSISTANT}\n")], weight=0.0)
        return draft.sample(key)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def __setstate__(self, state: dict[str, object]) -> None:
        # The flag is no part of tokenizer.json, and so of its pickle.
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def _add_chat(self, draft: _Draft, chat: Chat) -> None:
        newline = self._text("\n")
        for message in chat.messages:
            if message.role not in ROLES:
                raise DataError("unknown role", f"{message.role!r} is none of {', '.join(ROLES)}")
            weight = message.weight
            if weight is None:
                weight = 1.0 if message.role == ASSISTANT else 0.0
            draft.add([self._message_start, *self._text(f"{message.role}\n")], weight=0.0)
            self._add_parts(draft, message.parts, weight=weight)
            draft.add([self._message_end], weight=weight)
            draft.add(newline, weight=0.0)

    def _add_parts(self, draft: _Draft, parts: Iterable[Part], weight: float) -> None:
        for part in parts:
            if isinstance(part, str):
                draft.add(self._text(part), weight=weight)
            elif isinstance(part, Video):
                for frame in part.frames:
                    self._add_image(draft, [self._patches(frame)], VIDEO)
            else:
                self._add_image(draft, self._images(part), IMAGE)

    def _add_image(self, draft: _Draft, images: list[ImagePatches], modality: int) -> None:
        draft.add([self._image_prefix], weight=0.0)
        placeholders = [self.image_token_id] * sum(image.num_features for image in images)
        draft.add(placeholders, weight=0.0, modality=modality)
        draft.add([self._image_suffix], weight=0.0)
        draft.images.extend(images)

    def _images(self, image: Image.Image) -> list[ImagePatches]:
        whole_and_crops = crops.split(image, self.image_size) if self.split_image else [image]
        return [self._patches(crop) for crop in whole_and_crops]

    def _patches(self, crop: Image.Image) -> ImagePatches:
        crop = crop if crop.mode == "RGB" else crop.convert("RGB")
        patches_PC, rows, columns = crops.patches(crop, self.image_size, self.min_image_size, self.patch_size)
        return ImagePatches(
            patches_PC, _positions(rows, columns, self.position_grid), self.features_per_image
        )

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            special = [added.content for added in self.tokenizer.get_added_tokens_decoder().values()]
            raise ConfigError(f"the tokenizer has no token {token!r}{hint(token, special)}")
        return int(found)


class _Draft:
    """A sample under construction."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.modalities: list[int] = []
        self.images: list[ImagePatches] = []

    def add(self, ids: list[int], *, weight: float, modality: int = TEXT) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.modalities += [modality] * len(ids)

    def sample(self, key: str) -> Sample:
        return Sample(
            key,
            np.array(self.ids, dtype=np.int32),
            np.array(self.weights, dtype=np.float32),
            np.array(self.modalities, dtype=np.int8),
            tuple(self.images),
        )


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


@lru_cache(maxsize=1024)
def _positions(rows: int, columns: int, grid: int) -> NDArray[np.int64]:
    positions: NDArray[np.int64] = np.asarray(patch_position_ids(rows, columns, grid), dtype=np.int64)
    return positions
