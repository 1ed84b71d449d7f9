"""What travels between data, models and trainers.

Shape suffixes used throughout Cantata:
    T  tokens of a micro-batch (all its rows, packed end to end)
    N  tokens that carry a target        Q  image features (projector outputs)
    P  image patches of a micro-batch    I  images of a micro-batch
    C  values of a patch (channels * patch_size ** 2)
    D  hidden size    H  attention heads    h  head dimension    V  vocabulary
    E  experts        K  experts per token (top_k)
    F  expert width   L  MoE layers         M  modalities
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that carries no target."""

MODALITIES = ("text", "image", "video")
"""Names of the modality ids 0, 1, 2."""

TEXT, IMAGE, VIDEO, PADDING = 0, 1, 2, -1


@dataclass(frozen=True)
class Segments:
    """Lengths of consecutive runs in a packed sequence.

    The lengths live on the host, so that no kernel launch waits for the device.
    """

    lengths: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    def offsets(self, device: torch.device | str = "cpu") -> Tensor:
        """Cumulative lengths, int32, one more than there are segments (starts at 0)."""
        offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return offsets.to(device, non_blocking=True)

    def ids(self, device: torch.device | str = "cpu") -> Tensor:
        """The index of the segment of each position, int64, (total,)."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        index = torch.arange(len(self.lengths), device=device)
        return torch.repeat_interleave(index, lengths, output_size=self.total)

    @staticmethod
    def concatenate(parts: Iterable[Segments]) -> Segments:
        return Segments(tuple(length for part in parts for length in part.lengths))


@dataclass
class Images:
    """The images of a micro-batch, packed without padding: valid patches only.

    A batch without images holds empty tensors, so that every rank runs the tower.
    """

    patches_PC: Tensor
    """Pixels of each patch in (channel, row, column) order: uint8, or already normalised floats."""
    position_ids_P: Tensor
    """Index of each patch into the tower's learned positions, int64."""
    patches: Segments
    """Patches of each image."""
    features: Segments
    """Features that the projector makes of each image."""
    token_index_Q: Tensor
    """Position in the packed tokens of each feature, int64."""
    first_tokens: tuple[int, ...] = ()
    """Position in the packed tokens of the first feature of each image that has any; on the host, for models
    whose text attends to images by where they stand."""
    prefix: Segments | None = None
    """First patches of each image that see one another whole, where later ones see those before them alone;
    None where all patches of an image see each other."""

    def predicted(self) -> tuple[Tensor, Tensor]:
        """The patches after their image's prefix: index (R,), int64, and 1 / their number in the image, fp32.

        On the host, so that their number is known there; none without prefixes.
        """
        if self.prefix is None:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        after_P = torch.cat(
            [torch.arange(n) >= m for n, m in zip(self.patches.lengths, self.prefix.lengths, strict=True)]
            or [torch.empty(0, dtype=torch.bool)]
        )
        counts = [n - m for n, m in zip(self.patches.lengths, self.prefix.lengths, strict=True)]
        counts_I = torch.tensor(counts, dtype=torch.float32)
        index_R = after_P.nonzero().flatten()
        return index_R, 1.0 / counts_I[self.patches.ids()[index_R]]


class RowInfo(NamedTuple):
    """Where a packed row came from; names a batch in messages and carries the loader's state."""

    stream: int
    """The logical stream that made the row."""
    samples: tuple[str, ...]
    """`source:index` of each sample in it."""
    state: dict[str, Any]
    """State of the stream after this row (plain JSON values)."""
    dropped: tuple[tuple[str, str, int], ...] = ()
    """(source, reason, index) of each sample dropped on the way to this row."""


@dataclass
class Batch:
    """A micro-batch: samples packed end to end, then padding up to a fixed T."""

    input_ids_T: Tensor
    labels_T: Tensor
    """The token that each position must predict (already shifted), or `IGNORE_INDEX`; int64."""
    position_ids_T: Tensor
    """Position inside the sample, int64."""
    modality_ids_T: Tensor
    """Index into `MODALITIES`, or `PADDING`; int64."""
    target_index_N: Tensor
    """Positions whose label is not `IGNORE_INDEX`, int64; made on the host, so its size is known there."""
    target_modality_N: Tensor
    """Modality of the sample that each target stands in: `TEXT` where it holds nothing else; int64."""
    samples: Segments
    """Tokens of each sample; their total is the number of tokens before the padding."""
    images: Images
    rows: tuple[RowInfo, ...] = field(default=())
    target_weight_N: Tensor | None = None
    """Weight of each target in the loss, fp32; None where all weigh 1."""

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.samples.total

    @property
    def num_targets(self) -> int:
        return self.target_index_N.numel()

    @property
    def target_weight(self) -> float:
        """Weight of all targets together; waits for the device that they are on."""
        weight_N = self.target_weight_N
        return self.num_targets if weight_N is None else weight_N.double().sum().item()

    def token_groups(self) -> TokenGroups:
        """The modality and the sample of every token, on the device of `modality_ids_T`."""
        sample_T = torch.full_like(self.modality_ids_T, len(self.samples.lengths))
        sample_T[: self.samples.total] = self.samples.ids(sample_T.device)
        return TokenGroups(self.modality_ids_T, sample_T, len(self.samples.lengths))

    def describe(self) -> str:
        """The samples of this batch, for messages."""
        return _shortened([name for row in self.rows for name in row.samples])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy whose tensors live on `device`."""
        return _move(self, device, non_blocking)


@dataclass
class PixelBatch:
    """A micro-batch of images or clips of one size, for training and measuring image tokenizers.

    B  images or clips    T  frames (1 of images)    C  channels    H, W  rows and columns
    """

    pixels_BTCHW: Tensor
    """uint8."""
    is_real_B: Tensor
    """bool; False of what only fills up a batch so that ranks keep in step (in evaluation alone)."""
    keys: tuple[str, ...]
    """`source:index` of each real one."""
    codes_per_image: int
    """Positions of the grid of codes that each becomes."""
    rows: tuple[RowInfo, ...] = field(default=())

    @property
    def num_tokens(self) -> int:
        """Codes of the real images."""
        return len(self.keys) * self.codes_per_image

    @property
    def num_targets(self) -> int:
        return self.num_tokens

    @property
    def target_weight(self) -> float:
        """Values that are reconstructed: what losses are means over."""
        return float(len(self.keys) * self.pixels_BTCHW[0].numel())

    def describe(self) -> str:
        """The samples of this batch, for messages."""
        return _shortened(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PixelBatch:
        """A copy whose tensors live on `device`."""
        return _move(self, device, non_blocking)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


Record = TypeVar("Record", Batch, Images, PixelBatch)


def _move(record: Record, device: torch.device | str, non_blocking: bool) -> Record:
    moved: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            moved[item.name] = value.to(device, non_blocking=non_blocking)
        elif isinstance(value, Images):
            moved[item.name] = _move(value, device, non_blocking)
    return replace(record, **moved)


class MicroBatch(Protocol):
    """What the loop needs of a micro-batch, whatever it holds."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_targets(self) -> int: ...

    @property
    def target_weight(self) -> float:
        """What the objective's losses are divided by, over the whole step."""
        ...

    def describe(self) -> str:
        """Its samples, for messages."""
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self: ...


class TokenGroups(NamedTuple):
    """What each token belongs to; routing is balanced over these groups."""

    modality_T: Tensor
    """Index into `MODALITIES`, or `PADDING`; int64."""
    sample_T: Tensor
    """Index of the sample, int64; padding holds `num_samples`."""
    num_samples: int


class RouterStats(NamedTuple):
    """What an MoE layer says of its routing; a model stacks its layers on the first axis.

    Sums over tokens, padding left out, so that they add up over ranks and micro-batches. The first three
    carry gradient, unless the router is frozen.
    """

    mass_ME: Tensor
    """Router probability of each expert by modality, fp32: (M, E) or (L, M, E)."""
    z_sum: Tensor
    """Squared logsumexp of the logits, fp32: scalar or (L,)."""
    sequence_sum: Tensor
    """Switch balance loss of each sample times its tokens, fp32: scalar or (L,); 0 where none asks for it."""
    tokens_per_expert_ME: Tensor
    """Tokens that chose each expert, by modality; int64, (M, E) or (L, M, E)."""


class ModelOutput(NamedTuple):
    """What a language model's forward returns."""

    loss_sum: Tensor
    """Cross entropy times its weight, summed over the targets, fp32 scalar."""
    loss_N: Tensor
    """Cross entropy of each target without its weight, fp32, detached."""
    router: RouterStats | None
    logits_TV: Tensor | None


class StepTotals(NamedTuple):
    """Counts of one optimizer step over all ranks and micro-batches."""

    tokens: int
    target_tokens: int
    target_weight: float
    """What the targets weigh together: their number, unless messages are weighted."""
