"""What a model must say of itself, so that plans and trainers need not know its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cantata.core.samples import Processor
from cantata.core.types import Batch, Images, ModelOutput, RouterStats, Segments
from cantata.nn.attention import Attend
from cantata.nn.cross_attention import ImageReading, Reading
from cantata.nn.moe.balance import BalanceConfig
from cantata.nn.moe.layer import MoELayer
from cantata.nn.quantize.base import Quantized, Quantizer


class Unit(NamedTuple):
    """A part that is sharded, recomputed and compiled as one."""

    name: str
    module: nn.Module
    is_block: bool
    """Repeated block: recomputed and compiled. Others (embeddings, head, projector) are only sharded."""
    in_fp32: bool = False
    """Its parameters stay fp32 while they compute, whatever the engine's precision (codebooks)."""


class Written(Protocol):
    """What writing a checkpoint needs of its names."""

    def to_hub(self, name: str) -> str:
        """The hub's key of a native parameter."""
        ...

    def hub_shape(self, name: str, shape: torch.Size) -> torch.Size:
        """The shape that the hub's tensor has, where a reshape is all that differs."""
        ...

    def hub_config(self) -> dict[str, object]:
        """`config.json` as transformers reads it; `ConfigError` where the layout cannot tell how to route."""
        ...


class HubLayout(Written, Protocol):
    """The names of a family's published checkpoints, both ways."""

    def hub_key(self, stored: str) -> str | tuple[str, ...] | None:
        """The hub's key that a key of a file stands for; None for what is no part of the model.

        Several where a file stacks as many tensors of one shape along their first dimension.
        """
        ...

    def transformers_name(self, name: str) -> str:
        """What transformers' model in memory calls a native parameter."""
        ...

    def is_attention_output(self, name: str) -> bool:
        """Whether a native parameter is of the `out_proj` of an `nn.MultiheadAttention` there."""
        ...

    def write_processor(self, processor: Processor, directory: Path) -> list[str]:
        """Write tokenizer and processor files beside the weights; returns lines on what is not there."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """What plans, engines and checkpoints need of a model, whatever it learns."""

    def units(self) -> Sequence[Unit]:
        """Every part that holds parameters, in the order in which forward runs them."""
        ...

    def moe_layers(self) -> Sequence[MoELayer]:
        """The MoE layers, in the order of `RouterStats`' first axis."""
        ...

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a whole (unsharded) parameter or buffer with its initial values."""
        ...

    def flops_per_token(self, mean_sample_length: float) -> float:
        """Forward and backward operations of one text token, active experts only; or of one code."""
        ...

    @property
    def balance(self) -> BalanceConfig | None:
        """How the routers are balanced; None for a model without experts."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@runtime_checkable
class LanguageModel(Trainable, Protocol):
    """A model that trains by next-token prediction on packed batches."""

    def __call__(self, batch: Batch, *, with_logits: bool = False) -> ModelOutput: ...

    def check_processor(self, processor: Processor) -> None:
        """Raise `ConfigError` where the processor's tokens, patches or features are not this model's."""
        ...

    def hub_layout(self) -> HubLayout: ...


class PatchOutput(NamedTuple):
    """What a model that predicts patches and text returns; the first four fields are `ModelOutput`'s.

    P  patches of all images    R  predicted ones (`Images.predicted`)    C  values of a patch
    """

    loss_sum: Tensor
    loss_N: Tensor
    router: RouterStats | None
    logits_TV: Tensor | None
    predicted_RC: Tensor
    """Normalised values that stand where each predicted patch is expected."""
    patches_PC: Tensor
    """Values as the encoder read them."""


class PairFeatures(NamedTuple):
    """Unit vectors of images and of the texts that belong to them, in one order, fp32.

    I  images    S  texts, as many    D  width of the shared space
    """

    image_ID: Tensor
    text_SD: Tensor
    scale: Tensor
    """Factor of their products; fp32 scalar."""


class HubPart(NamedTuple):
    """Parameters whose initial values come from a folder of their own."""

    names: frozenset[str]
    """Their native names."""
    directory: str
    layout: HubLayout


@runtime_checkable
class PatchPredictor(Protocol):
    """A language model that predicts patches too: it returns `PatchOutput`."""

    pixel_head: nn.Module


@runtime_checkable
class PairEncoder(Protocol):
    """A model that learns which images and texts belong together: it returns `PairFeatures`."""

    def image_features(self, images: Images) -> Tensor:
        """A unit vector for each image, (I, D), fp32."""
        ...

    def text_features(self, input_ids_T: Tensor, position_ids_T: Tensor, texts: Segments) -> Tensor:
        """A unit vector for each text, (S, D), fp32."""
        ...


@runtime_checkable
class AssembledFrom(Protocol):
    """A model that may take parts of itself from folders besides `model.weights`."""

    def parts(self) -> Sequence[HubPart]:
        """None where all comes from one place."""
        ...


@runtime_checkable
class PartlyPublished(Protocol):
    """A model of which a published folder holds a part: what only training needs stays behind."""

    def is_published(self, name: str) -> bool:
        """Whether a native parameter is written to a folder."""
        ...


class TokenizerOutput(NamedTuple):
    """What an image tokenizer makes of pixels while it trains.

    B  images or clips    T  frames    C  channels    H, W  rows and columns of pixels
    """

    reconstruction_BTCHW: Tensor
    """Pixels after decoding, not clamped; the range of the input, -1 to 1."""
    quantized: Quantized
    last_input: Tensor
    """What the decoder's last convolution read, channels second: the adaptive weight needs it."""


@runtime_checkable
class ImageTokenizer(Trainable, Protocol):
    """A model that turns pixels into a grid of codes and back.

    Pixels are floats from -1 to 1, (B, T, C, H, W); images are clips of one frame.
    """

    quantizer: Quantizer

    def __call__(self, pixels_BTCHW: Tensor) -> TokenizerOutput: ...

    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Codes, int64: (B, t, h, w), or (B, t, h, w, R) of a residual quantiser."""
        ...

    def decode(self, codes_Bthw: Tensor) -> Tensor:
        """Pixels (B, T, C, H, W), from -1 to 1 but not clamped."""
        ...

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of clips of this size; `ConfigError` for one that the model cannot take."""
        ...

    @property
    def last_layer(self) -> nn.Module:
        """The decoder's last convolution, `nn.Conv2d` or `nn.Conv3d`: it reads `last_input`."""
        ...

    def hub_layout(self) -> HubLayout: ...


@runtime_checkable
class EmbedsTokens(Protocol):
    """A model that says where its tokens become vectors, so that training can put noise on them."""

    @property
    def token_embedding(self) -> nn.Module:
        """From token ids (T,) to vectors (T, D), of which image features then replace the placeholders'."""
        ...


@runtime_checkable
class ReadsAcross(Protocol):
    """A model whose text reads images by cross attention: an image is one token, and who reads which follows
    from where they stand."""

    @property
    def patches_per_image(self) -> int:
        """Most patches that an image has; 0 for a model of text alone."""
        ...


class DecodingStep(Protocol):
    """One forward of a generation: how its layers attend, and where their keys and values are kept."""

    @property
    def is_prefill(self) -> bool:
        """Whether the batch holds whole prompts, with their images; else one new token of each sequence."""
        ...

    def attention(self, layer: int) -> Attend:
        """What the self-attention of a layer, counted from 0, attends with in this forward."""
        ...

    def reading(self, layer: int, images: ImageReading | None) -> Reading:
        """What the cross attention of a layer reads with; `images` is that of the prompts, in a prefill."""
        ...


@runtime_checkable
class Decodes(Protocol):
    """A language model that goes on with sequences whose keys and values are kept."""

    @property
    def max_positions(self) -> int:
        """Longest sequence that it is made for, in tokens."""
        ...

    def __call__(
        self, batch: Batch, *, with_logits: bool = False, step: DecodingStep | None = None
    ) -> ModelOutput:
        """With a step, for a batch without targets or padding: only the logits after each sample, (S, V)."""
        ...


Fill = Callable[[str, Tensor], None]
"""Writes the value of a named, whole tensor."""
