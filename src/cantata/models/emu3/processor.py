"""Text, tokenised images and conversations as Emu3 reads them (Wang et al., 2024, arXiv:2409.18869).

T  tokens    t, h, w  frames, rows and columns of codes
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image

from cantata.core.chat_template import ASSISTANT, ChatTemplate, weight_of
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Codes, DataError, Document, Example, ImagePatches, Part, Sample, Video
from cantata.core.types import IMAGE, VIDEO
from cantata.models.chat_processor import load_tokenizer, text_ids
from cantata.models.draft import Draft
from cantata.models.emu3.config import Emu3Tokens

SYSTEM = "You are a helpful assistant."
"""What Emu3-Chat is told where a conversation has no system message."""
PLACEHOLDER = "<image>"
"""What stands for an image in a chat template."""

_SPECIAL = re.compile(r"<\|.*\|>|<[a-z]+>")
"""How tokenizers spell tokens that no text becomes."""


class _Piece(NamedTuple):
    """A stretch of a sample."""

    part: Part | None
    """None: the token that ends a sample or what an assistant says."""
    weight: float
    is_template: bool = False
    """Text in which a special token spelt out is one."""


class Emu3Processor:
    """Encodes examples for Emu3, images and clips as codes that a tokenizer has made of them before.

    A sample is `bos`, its parts, `eos`. An image is `boi`, its rows and columns as text ("8*8"), `img`, then
    each row of codes and `eol`, then `eof` and `eoi`; a clip is the same with the rows and `eof` of every
    frame. All of an image counts as vision, its size included. The end weighs what the part before it does.

    A conversation is written as Emu3-Chat's, "You are a helpful assistant. USER: {images}{text}. ASSISTANT:",
    or as `chat_template` says, in which `<image>` stands for an image; of it the model learns what the
    assistant says and the `eos` after it, unless a message weighs itself.
    Text is only ever text: a sample that spells out a special token does not get that token.

    Args:
        tokenizer: a `tokenizer.json`, or a folder that holds one; `embedded:` names one of the package.
        tokens: ids of structure and codes.
        text_weight: weight of text in the loss.
        vision_weight: weight of images and clips in the loss (0.5 as published).
        chat_template: a Jinja template, or a checkpoint's folder that holds one; null: as Emu3-Chat's.

    Raises `ConfigError` where the file is no tokenizer, an id is that of text, or nothing is learned.
    """

    patch_values = 0
    """There are no patches: images are tokens."""
    image_token_id = -1
    """No token stands for features of an image."""

    def __init__(
        self,
        tokenizer: str,
        tokens: Emu3Tokens,
        text_weight: float,
        vision_weight: float,
        chat_template: str | None,
    ) -> None:
        for name, weight in (("text_weight", text_weight), ("vision_weight", vision_weight)):
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name}={weight} must be at least 0")
        if not text_weight and not vision_weight:
            raise ConfigError("text_weight and vision_weight are both 0: nothing would be learned")
        self.tokenizer = load_tokenizer(tokenizer)
        self.tokens = tokens
        self.text_weight = text_weight
        self.vision_weight = vision_weight
        self._check_ids()
        self.pad_token_id = tokens.pad
        self.vocab_size = max(self.tokenizer.get_vocab_size(with_added_tokens=True), tokens.size)
        self._names = {token: f"<{name}>" for name, token in tokens.structure().items()}
        self.template: ChatTemplate | None = None
        """The chat template, where it is not Emu3-Chat's."""
        if chat_template is not None:
            self._template_tokenizer = load_tokenizer(tokenizer)
            added = self.tokenizer.get_added_tokens_decoder().values()
            special = [token.content for token in added if token.special and token.content != PLACEHOLDER]
            self.template = ChatTemplate(chat_template, special)
        self._set_literal()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self.tokens.eos,)

    def encode(self, example: Example, key: str) -> Sample:
        """A training sample.

        Raises `DataError` for an unknown role, an image that is no codes yet, or codes out of range.
        """
        return self._sample(key, self._pieces(example, is_prompt=False))

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """What a generation continues: a document without its end, a chat up to the assistant's words."""
        return self._sample(key, self._pieces(example, is_prompt=True))

    def encode_image_prompt(self, text: str, height: int, width: int, key: str = "prompt") -> Sample:
        """What an image of so many rows and columns of codes continues; an empty text is the null prompt.

        Raises `DataError` for an image without codes.
        """
        _check_grid(height, width)
        draft = Draft()
        draft.add([self.tokens.bos, *self._text(text)], weight=0.0)
        draft.add(self._image_head(height, width), weight=0.0, modality=IMAGE)
        return draft.sample(key)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens and images with their sizes left out."""
        text, is_size = [], False
        for token in token_ids:
            is_size = token == self.tokens.boi or (is_size and self._is_text(token))
            if not is_size and self._is_text(token):
                text.append(token)
        return str(self.tokenizer.decode(text, skip_special_tokens=True))

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, others spelt out: `<bos>`, `<visual 17>`."""
        spelt = []
        for is_text, run in groupby(token_ids, self._is_text):
            if is_text:
                spelt.append(str(self.tokenizer.decode(list(run), skip_special_tokens=False)))
            else:
                spelt += [self._name(token) for token in run]
        return "".join(spelt)

    def picture(self, image: ImagePatches) -> NoReturn:
        """Emu3's samples hold no patches."""
        raise TypeError("Emu3 reads images as tokens; a tokenizer makes pictures of them")

    def __setstate__(self, state: dict[str, object]) -> None:
        # The flag is no part of tokenizer.json, and so of its pickle.
        self.__dict__.update(state)
        self._set_literal()

    def _set_literal(self) -> None:
        self.tokenizer.encode_special_tokens = True
        if self.template is not None:
            self._template_tokenizer.encode_special_tokens = False

    def _pieces(self, example: Example, *, is_prompt: bool) -> Iterator[_Piece]:
        if isinstance(example, Document):
            yield from (_Piece(part, 0.0 if is_prompt else 1.0) for part in example.parts)
            if not is_prompt:
                yield _Piece(None, 1.0)
        elif self.template is not None:
            yield from self._templated(example, self.template, is_prompt)
        else:
            yield from self._chat(example, is_prompt)

    def _chat(self, chat: Chat, is_prompt: bool) -> Iterator[_Piece]:
        if not chat.messages or chat.messages[0].role != "system":
            yield _Piece(SYSTEM, 0.0)
        for message in chat.messages:
            weight = weight_of(message) * (not is_prompt)
            parts = message.parts
            if message.role == ASSISTANT:
                yield _Piece(" ASSISTANT:", 0.0)
                if parts and isinstance(parts[0], str) and not parts[0].startswith(" "):
                    yield _Piece(" ", weight)
            elif message.role != "system":
                yield _Piece(" USER: ", 0.0)
            yield from (_Piece(part, weight) for part in parts)
            if message.role == ASSISTANT:
                yield _Piece(None, weight)
            elif message.role != "system":
                yield _Piece(".", weight)
        if is_prompt:
            yield _Piece(" ASSISTANT:", 0.0)

    def _templated(self, chat: Chat, template: ChatTemplate, is_prompt: bool) -> Iterator[_Piece]:
        images = [part for message in chat.messages for part in message.parts if not isinstance(part, str)]
        rest = iter(images)
        last = 0.0
        for text, is_template, weight in template.render(chat, is_prompt):
            last = weight
            if not is_template:
                yield _Piece(text, weight)
                continue
            for number, stretch in enumerate(text.split(PLACEHOLDER)):
                if number:
                    image = next(rest, None)
                    if image is None:
                        raise DataError(
                            "chat template", f"it has more images than the {len(images)} there are"
                        )
                    yield _Piece(image, weight)
                yield _Piece(stretch, weight, is_template=True)
        if next(rest, None) is not None:
            raise DataError("chat template", f"it leaves out some of {len(images)} images")
        if not is_prompt:
            yield _Piece(None, last)

    def _sample(self, key: str, pieces: Iterable[_Piece]) -> Sample:
        draft = Draft()
        draft.add([self.tokens.bos], weight=0.0)
        scale = self.text_weight
        for piece in _merged(pieces):
            if piece.part is None:
                draft.add([self.tokens.eos], weight=piece.weight * scale)
            elif isinstance(piece.part, str):
                scale = self.text_weight
                ids = self._template_text(piece.part) if piece.is_template else self._text(piece.part)
                draft.add(ids, weight=piece.weight * scale)
            else:
                scale = self.vision_weight
                ids, modality = self._image(piece.part)
                draft.add(ids, weight=piece.weight * scale, modality=modality)
        return draft.sample(key)

    def _image(self, part: Image.Image | Video | Codes) -> tuple[list[int], int]:
        """The tokens of an image or a clip, and its modality."""
        if not isinstance(part, Codes):
            raise DataError("image is no codes", "Emu3 reads images as codes; run `cantata tokenize` first")
        codes_thw, tokens = part.codes_thw, self.tokens
        if codes_thw.ndim != 3 or not codes_thw.size:
            raise DataError("image codes", f"their shape is {codes_thw.shape}, not (frames, rows, columns)")
        least, most = int(codes_thw.min()), int(codes_thw.max())
        if least < 0 or most >= tokens.codebook_size:
            raise DataError(
                "image codes", f"{least} to {most} are not all of 0 to {tokens.codebook_size - 1}"
            )
        frames, rows, columns = codes_thw.shape
        ends = ((0, 0), (0, 0), (0, 1))
        lines_thw = np.pad(
            codes_thw.astype(np.int64) + tokens.visual_offset, ends, constant_values=tokens.eol
        )
        lines = np.pad(lines_thw.reshape(frames, -1), ((0, 0), (0, 1)), constant_values=tokens.eof)
        ids = [*self._image_head(rows, columns), *lines.flatten().tolist(), tokens.eoi]
        return ids, VIDEO if frames > 1 else IMAGE

    def _image_head(self, rows: int, columns: int) -> list[int]:
        return [self.tokens.boi, *self._text(f"{rows}*{columns}"), self.tokens.img]

    def _text(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)

    def _template_text(self, text: str) -> list[int]:
        ids: list[int] = self._template_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _is_text(self, token: int) -> bool:
        return token not in self._names and not self.tokens.is_visual(token)

    def _name(self, token: int) -> str:
        return self._names.get(token) or f"<visual {token - self.tokens.visual_offset}>"

    def _check_ids(self) -> None:
        """Raise where text could hold one of the ids: within the tokenizer all must be its special tokens."""
        end = self.tokenizer.get_vocab_size(with_added_tokens=True)
        visual = range(self.tokens.visual_offset, min(end, self.tokens.end_of_visual))
        special = self.tokenizer.get_added_tokens_decoder()
        for token in (*self.tokens.structure().values(), *visual):
            spelt = None if token in special else self.tokenizer.id_to_token(token)
            if spelt is not None and not _SPECIAL.fullmatch(spelt):
                raise ConfigError(
                    f"tokens: id {token} is {spelt!r} in the tokenizer, ordinary text; take ids from "
                    f"{end} on or the tokenizer's special tokens"
                )


def _merged(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Neighbouring texts of one weight as one, as a tokenizer should see them."""
    for (kind, weight, is_template), run in groupby(
        pieces, lambda piece: (isinstance(piece.part, str), piece.weight, piece.is_template)
    ):
        if kind:
            yield _Piece("".join(str(piece.part) for piece in run), weight, is_template)
        else:
            yield from run


def _check_grid(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise DataError("image codes", f"an image of {height} x {width} codes; both must be at least 1")
