"""What travels from datasets through a processor to the packer, before anything is a tensor.

T  tokens of a sample     P  valid patches of an image     C  values of a patch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Video(NamedTuple):
    """Frames of a clip, RGB, in the order of time."""

    frames: tuple[Image.Image, ...]


class Codes(NamedTuple):
    """An image or a clip that a tokenizer has turned into codes already."""

    codes_thw: NDArray[np.int64]


Part = str | Image.Image | Video | Codes
"""A piece of text, an RGB image, a clip, or either of them as codes. Pages of a document are images."""


class DataError(Exception):
    """One sample cannot be read or encoded; its source decides whether it is skipped or ends the run.

    `reason` is short and the same for every sample that fails alike ("corrupt image"), so that it can be
    counted; `detail` says what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Document:
    """Text and images in reading order; every text token is learned."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    parts: tuple[Part, ...]
    weight: float | None = None
    """Weight of what it says in the loss, its end included; None: 1 for the assistant, 0 for the others."""


@dataclass(frozen=True)
class Chat:
    """A conversation; unless its messages say otherwise, only what the assistant says is learned."""

    messages: tuple[Message, ...]


Example = Document | Chat


class ImagePatches(NamedTuple):
    """One image (or one crop of it) as the vision tower takes it."""

    patches_PC: NDArray[np.uint8]
    """Pixels of the valid patches, each in (channel, row, column) order."""
    position_ids_P: NDArray[np.int64]
    """Index of each patch into the tower's learned positions."""
    num_features: int
    """Features that the projector makes of it, which is also its number of placeholder tokens."""


@dataclass(frozen=True)
class Sample:
    """An encoded example: what is packed whole or not at all."""

    key: str
    """`source:index`, to name the sample in messages."""
    input_ids_T: NDArray[np.int32]
    weight_T: NDArray[np.float32]
    """Weight of predicting this token in the loss; 0 where it is only context."""
    modality_ids_T: NDArray[np.int8]
    """Index into `core.types.MODALITIES`."""
    images: tuple[ImagePatches, ...]

    def __len__(self) -> int:
        return len(self.input_ids_T)


@dataclass(frozen=True)
class PixelSample:
    """An image or a clip for training an image tokenizer; in a row it counts as one."""

    key: str
    """`source:index`, to name the sample in messages."""
    pixels_TCHW: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, ...]:
        """(T, C, H, W): what must agree within a batch."""
        return self.pixels_TCHW.shape

    def __len__(self) -> int:
        return 1


class Processor(Protocol):
    """Turns examples into token ids and patches for one model family."""

    @property
    def pad_token_id(self) -> int: ...

    @property
    def image_token_id(self) -> int:
        """What image features replace; -1 where a family has no such token."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def patch_values(self) -> int:
        """Values of a patch: channels * patch_size ** 2."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        ...

    def encode(self, example: Example, key: str) -> Sample:
        """A training sample. Raises `DataError` where the example cannot be encoded."""
        ...

    def encode_prompt(self, example: Example, key: str = "prompt") -> Sample:
        """The same without its end, ready to be continued: a chat ends with the assistant's header."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        ...

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens spelt out."""
        ...

    def picture(self, image: ImagePatches) -> Image.Image:
        """The pixels that the vision tower gets, laid out as an image again."""
        ...
