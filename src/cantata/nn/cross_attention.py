"""Cross attention of packed documents: which of their tokens read which of their images.

    R  tokens that read    F  features of all images, image after image    G  key-value heads

An image is read by the tokens from its placeholder on, up to the next image's; images that follow one another
without a token between them share what comes after the last of them, and of their placeholders each
reads the images up to its own. Documents never read each other's images, so packing changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.types import Segments
from cantata.nn.attention import PackedAttention
from cantata.nn.matmul import Linear, product_dtype
from cantata.nn.norm import RMSNorm


class Reading(Protocol):
    """Who reads, and how: made once per forward and handed to every cross-attention layer."""

    @property
    def tokens_R(self) -> Tensor:
        """Positions of the tokens that attend to images; no position twice."""
        ...

    @property
    def num_readers(self) -> int:
        """The first so many of them stand behind an image; the others only attend (see `ImageReading`)."""
        ...

    def __call__(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        """The attended values, shaped as the queries."""
        ...


class Group(NamedTuple):
    """Images that follow one another, and the tokens that read them."""

    first_token: int
    """The first image's placeholder; those of the others follow it."""
    images: range
    end: int
    """One more than the last token that reads them."""

    @property
    def last_placeholder(self) -> int:
        return self.first_token + len(self.images) - 1


class Document(NamedTuple):
    """A packed document's place among the tokens, and its images."""

    start: int
    end: int
    groups: tuple[Group, ...]


def find_documents(samples: Segments, first_tokens: Sequence[int]) -> Iterator[Document]:
    """The documents of a batch. Raises `ValueError` for a placeholder that is in none of them."""
    offsets = [0, *accumulate(samples.lengths)]
    if list(first_tokens) != sorted(set(first_tokens)) or not all(0 <= t < offsets[-1] for t in first_tokens):
        raise ValueError(f"placeholders at {first_tokens}: not in order, or beyond {offsets[-1]} tokens")
    image = 0
    for start, end in pairwise(offsets):
        begin = image
        while image < len(first_tokens) and first_tokens[image] < end:
            image += 1
        yield Document(start, end, tuple(_groups(range(begin, image), first_tokens, end)))


def _groups(images: range, first_tokens: Sequence[int], end: int) -> Iterator[Group]:
    first = images.start
    for image in images:
        is_last = image + 1 == images.stop
        if is_last or first_tokens[image + 1] > first_tokens[image] + 1:
            yield Group(
                first_tokens[first], range(first, image + 1), end if is_last else first_tokens[image + 1]
            )
            first = image + 1


class ImageReading:
    """Who reads which features in one packed batch, without a mask over tokens and features.

    Args:
        samples: tokens of each document.
        first_tokens: position of each image's placeholder, one token each.
        features: features of each image.
        readable: how many of them, the first ones, its readers attend to.
        before: whether tokens before the first image of their document attend, to all features of all
            its images; they are no readers.
        device: of the tokens.
    """

    def __init__(
        self,
        samples: Segments,
        first_tokens: Sequence[int],
        features: Segments,
        readable: Sequence[int],
        *,
        before: bool,
        device: torch.device,
    ) -> None:
        if not len(first_tokens) == len(features.lengths) == len(readable):
            raise ValueError(f"{len(features.lengths)} images, but {len(first_tokens)} placeholders")
        self._starts = [0, *accumulate(features.lengths)]
        self._readable, self._device = readable, device
        self._documents = list(find_documents(samples, first_tokens))
        seeing = [document for document in self._documents if document.groups]
        groups = [group for document in seeing for group in document.groups]
        tails = [range(group.last_placeholder, group.end) for group in groups]
        crowds = [group for group in groups if len(group.images) > 1]
        self._crowds = [self._crowd(group) for group in crowds]
        heads = [range(group.first_token, group.last_placeholder) for group in crowds]
        ahead = [range(one.start, one.groups[0].first_token) for one in seeing] if before else []
        self._tails, self._heads = sum(map(len, tails)), [len(head) for head in heads]
        self.num_readers = self._tails + sum(self._heads)
        self.tokens_R = _indices([*tails, *heads, *ahead], device)
        self._index_F = None if sum(readable) == features.total else self._rows(groups)
        read = Segments(tuple(self._count(group.images) for group in groups))
        self._attend_tails = PackedAttention(Segments(tuple(map(len, tails))), read, causal=False)
        self._attend_ahead: PackedAttention | None = None
        if any(ahead):
            whole = [sum(features.lengths[i] for g in one.groups for i in g.images) for one in seeing]
            lengths = Segments(tuple(map(len, ahead)))
            self._attend_ahead = PackedAttention(lengths, Segments(tuple(whole)), causal=False)

    # A compiled block would be compiled again for every new layout of documents.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        """See `Reading`."""
        tails, *heads, ahead = torch.split(q_RHh, [self._tails, *self._heads, len(q_RHh) - self.num_readers])
        k, v = k_FGh, v_FGh
        if self._index_F is not None:
            k, v = k.index_select(0, self._index_F), v.index_select(0, self._index_F)
        parts = [self._attend_tails(tails, k, v)]
        for crowd, q in zip(self._crowds, heads, strict=True):
            parts.append(crowd.attend(q, k_FGh, v_FGh))
        if self._attend_ahead is not None:
            parts.append(self._attend_ahead(ahead, k_FGh, v_FGh))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def kept(self) -> tuple[Tensor, Segments]:
        """Which features a token after each document's end would read: (their index, how many of each)."""
        last = [document.groups[-1] if document.groups else None for document in self._documents]
        counts = tuple(self._count(group.images) if group is not None else 0 for group in last)
        return self._rows([group for group in last if group is not None]), Segments(counts)

    def _crowd(self, group: Group) -> _Crowd:
        image_F = Segments(tuple(self._readable[image] for image in group.images)).ids()
        visible_RF = image_F <= torch.arange(len(group.images) - 1)[:, None]
        return _Crowd(self._rows([group]), visible_RF.to(self._device, non_blocking=True))

    def _count(self, images: range) -> int:
        return sum(self._readable[image] for image in images)

    def _rows(self, groups: Sequence[Group]) -> Tensor:
        images = [image for group in groups for image in group.images]
        starts = [self._starts[image] for image in images]
        ranges = [range(s, s + self._readable[i]) for s, i in zip(starts, images, strict=True)]
        return _indices(ranges, self._device)


class _Crowd(NamedTuple):
    """The placeholders of a group but its last, each to the images up to its own: few, so with a mask."""

    index_F: Tensor
    visible_RF: Tensor

    def attend(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        wide, gqa = product_dtype(q_RHh), q_RHh.shape[1] != k_FGh.shape[1]
        k, v = k_FGh.index_select(0, self.index_F), v_FGh.index_select(0, self.index_F)
        q, k, v = (x.to(wide).transpose(0, 1)[None] for x in (q_RHh, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible_RF, enable_gqa=gqa)
        return out[0].transpose(0, 1).to(q_RHh.dtype)


class CrossAttention(nn.Module):
    """Grouped-query attention to features, without positions or biases; queries and keys are normed by head.

    hidden_size: width of tokens and features.
    num_heads, num_kv_heads: heads of queries, and of keys and values; the second divides the first.
    head_dim: width of a head.
    eps: of the norms.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(hidden_size, q_size, bias=False)
        self.k_proj = Linear(hidden_size, kv_size, bias=False)
        self.v_proj = Linear(hidden_size, kv_size, bias=False)
        self.o_proj = Linear(q_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, eps)
        self.k_norm = RMSNorm(head_dim, eps)

    def forward(self, x_RD: Tensor, features_FD: Tensor, reading: Reading) -> Tensor:
        """What the reading tokens get of the features, (R, D)."""
        own = (len(x_RD), self.num_heads, self.head_dim)
        theirs = (len(features_FD), self.num_kv_heads, self.head_dim)
        q_RHh = self.q_norm(self.q_proj(x_RD).view(own))
        k_FGh = self.k_norm(self.k_proj(features_FD).view(theirs))
        v_FGh = self.v_proj(features_FD).view(theirs)
        return self.o_proj(reading(q_RHh, k_FGh, v_FGh).flatten(-2))


def _indices(ranges: Sequence[range], device: torch.device) -> Tensor:
    parts = [torch.arange(one.start, one.stop) for one in ranges]
    index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return index.to(device, non_blocking=True)
