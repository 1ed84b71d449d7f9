"""What processors share whose images stand as placeholders among text: samples, weights, chat templates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

from PIL import Image
from tokenizers import Tokenizer

from cantata.core.chat_template import ChatTemplate, Piece
from cantata.core.errors import ConfigError
from cantata.core.locate import asset
from cantata.core.samples import Chat, Codes, DataError, Document, Example, ImagePatches, Part, Sample, Video
from cantata.core.suggest import hint
from cantata.core.types import IMAGE
from cantata.models.draft import Draft

Media = list[tuple[list[ImagePatches], int]]
"""The images, or crops of one, that stand together in a sample, and their modality."""


class ChatProcessor(ABC):
    """Encodes documents and conversations; how images and turns look is a family's own.

    Text is only ever text: a sample that spells out a special token does not get that token.

    Args:
        tokenizer: a `tokenizer.json`, or a folder that holds one; `embedded:` names one of the package.
        image_token: name of the placeholder.
        pad_token: name of the padding token.
        around_images: names of tokens that stand around placeholders and are never learned.
        chat_template: a Jinja template, or a checkpoint's folder that holds one; null: the family's own.

    Raises `ConfigError` where the file is no tokenizer, or a token is not in it.
    """

    _document_end: int
    _message_end: int
    """What ends a document, and a turn; a family's own tokens."""

    def __init__(
        self,
        tokenizer: str,
        image_token: str,
        pad_token: str,
        around_images: Collection[str],
        chat_template: str | None,
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self.image_token_id = self._id(image_token)
        self.pad_token_id = self._id(pad_token)
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self._around_images = [self._id(name) for name in around_images]
        self.template: ChatTemplate | None = None
        """The chat template, where it is not the family's own."""
        self._template_ids: dict[str, list[int]] = {}
        if chat_template is not None:
            self._load_template(
                chat_template, load_tokenizer(tokenizer), not_ends=(image_token, *around_images)
            )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends a generation."""
        return self._document_end, self._message_end

    def encode(self, example: Example, key: str) -> Sample:
        """A training sample. Raises `DataError` for an unknown role, an image without pixels, or codes."""
        draft = Draft()
        if isinstance(example, Document):
            self._add_document(draft, example.parts, is_prompt=False)
        else:
            self._add_chat(draft, example, is_prompt=False)
        return draft.sample(key)

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """What a generation continues: a document without its end, a chat with the assistant's header."""
        draft = Draft()
        if isinstance(example, Document):
            self._add_document(draft, example.parts, is_prompt=True)
        else:
            self._add_chat(draft, example, is_prompt=True)
        return draft.sample(key)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens spelt out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    @abstractmethod
    def _add_document(self, draft: Draft, parts: Sequence[Part], *, is_prompt: bool) -> None:
        """Text and images in reading order; all text is learned, unless it is a prompt."""

    @abstractmethod
    def _add_turns(self, draft: Draft, chat: Chat, *, is_prompt: bool) -> None:
        """A conversation in the family's own format."""

    @abstractmethod
    def _add_images(self, draft: Draft, images: list[ImagePatches], modality: int) -> None:
        """Images that stand together, as they look outside a chat template."""

    @abstractmethod
    def _media(self, part: Image.Image | Video | Codes) -> Media:
        """What an image or a clip becomes. Raises `DataError` where that cannot be."""

    def __getstate__(self) -> dict[str, object]:
        # What was encoded is no part of what it is: a cache of samples knows a processor by its pickle.
        return {**self.__dict__, "_template_ids": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        # The flag is no part of tokenizer.json, and so of its pickle.
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def _load_template(self, path: str, tokenizer: Tokenizer, not_ends: Collection[str]) -> None:
        # In what the template writes, a special token spelt out is one.
        tokenizer.encode_special_tokens = False
        self._template_tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special and token.content not in not_ends]
        self.template = ChatTemplate(path, special)

    def _add_chat(self, draft: Draft, chat: Chat, *, is_prompt: bool) -> None:
        if self.template is None:
            self._add_turns(draft, chat, is_prompt=is_prompt)
        else:
            self._add_templated(draft, chat, self.template.render(chat, is_prompt))

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
                    draft.add([token], weight=0.0 if token in self._around_images else weight)
        if next(rest, None) is not None:
            raise DataError("chat template", f"it leaves out some of {len(media)} images")

    def _encode_template(self, text: str) -> list[int]:
        # A template writes the same few pieces again and again.
        if text not in self._template_ids:
            self._template_ids[text] = text_ids(self._template_tokenizer, text)
        return self._template_ids[text]

    def _add_parts(self, draft: Draft, parts: Iterable[Part], weight: float) -> None:
        for part in parts:
            if isinstance(part, str):
                draft.add(self._text(part), weight=weight)
                continue
            for images, modality in self._media(part):
                self._add_images(draft, images, modality)

    def _add_placeholders(self, draft: Draft, images: list[ImagePatches], modality: int) -> None:
        placeholders = [self.image_token_id] * sum(image.num_features for image in images)
        draft.add(placeholders, weight=0.0, modality=modality)
        draft.images.extend(images)

    def _text(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)

    def _id(self, token: str) -> int:
        return token_id(self.tokenizer, token)


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, with nothing put around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token by its name; `ConfigError`, with the nearest, where there is none."""
    found = tokenizer.token_to_id(token)
    if found is None:
        special = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
        raise ConfigError(f"the tokenizer has no token {token!r}{hint(token, special)}")
    return int(found)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """The image itself where it is RGB already."""
    return image if image.mode == "RGB" else image.convert("RGB")
