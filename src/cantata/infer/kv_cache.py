"""Keys and values of sequences that are being generated, so that a new token costs one token.

    B  sequences, one row each    S  places of a row    G  key-value heads

A row is a sequence; its places are its tokens, and in layers that read images the features that new tokens
read. Rows stand side by side in one tensor for keys and one for values in each layer, made when the layer
first runs and grown in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.nn.attention import Attend, PackedAttention, attend_to_rows
from cantata.nn.cross_attention import ImageReading, Reading
from cantata.nn.matmul import product_dtype

BLOCK = 256
"""Places that a row grows by, so that memory is not moved for every token."""


@dataclass
class LayerCache:
    """Keys and values of one layer, in the dtype that attention multiplies in."""

    k_BSGh: Tensor
    v_BSGh: Tensor

    @classmethod
    def empty(cls, like_TGh: Tensor) -> LayerCache:
        """Without rows, for keys such as these."""
        none = like_TGh.new_empty((0, 0, *like_TGh.shape[1:]), dtype=product_dtype(like_TGh))
        return cls(none, none)

    def write(self, k_TGh: Tensor, v_TGh: Tensor, index_T: Tensor, rows: int, places: int) -> None:
        """Put tokens where the flat `index_T` into (rows, places) says, after growing to that size."""
        self.k_BSGh, self.v_BSGh = _grown(self.k_BSGh, rows, places), _grown(self.v_BSGh, rows, places)
        for kept, new_TGh in ((self.k_BSGh, k_TGh), (self.v_BSGh, v_TGh)):
            kept.flatten(0, 1).index_copy_(0, index_T, new_TGh.to(kept.dtype))

    def move(self, source: int, target: int, length: int) -> None:
        """Overwrite a row by the first `length` places of another."""
        for kept in (self.k_BSGh, self.v_BSGh):
            kept[target, :length] = kept[source, :length]


@dataclass
class Rows:
    """Keys and values of some layers, in rows of the same lengths."""

    lengths: list[int] = field(default_factory=list)
    """Places in use of each row."""
    _layers: dict[int, LayerCache] = field(default_factory=dict)
    _rows: int = 0
    _places: int = 0

    def add(self, new: Segments, device: torch.device) -> Tensor:
        """More rows, behind those that are there; the flat index of their places."""
        first = len(self.lengths)
        self.lengths += new.lengths
        self._reserve()
        row_T = first + new.ids(device)
        place_T = torch.cat([torch.arange(length, device=device) for length in new.lengths])
        return row_T * self._places + place_T

    def extend(self, device: torch.device) -> Tensor:
        """One more place for every row; the flat index of these."""
        place_B = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._reserve()
        return torch.arange(len(place_B), device=device) * self._places + place_B

    def visible(self, device: torch.device) -> Tensor | None:
        """Which places up to the longest row's end each row has; None where they are equally long."""
        if len(set(self.lengths)) == 1:
            return None
        length_B1 = torch.tensor(self.lengths, device=device)[:, None]
        return torch.arange(max(self.lengths), device=device) < length_B1

    def remove(self, row: int) -> None:
        """Drop a row; the last one moves to its place."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self._layers.values():
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def write(self, layer: int, k_TGh: Tensor, v_TGh: Tensor, index_T: Tensor) -> None:
        """Keep keys and values of a layer where the index says."""
        if layer not in self._layers:
            self._layers[layer] = LayerCache.empty(k_TGh)
        self._layers[layer].write(k_TGh, v_TGh, index_T, self._rows, self._places)

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, up to the end of the longest row."""
        kept, part = self._layers[layer], (slice(len(self.lengths)), slice(max(self.lengths)))
        return kept.k_BSGh[part], kept.v_BSGh[part]

    def _reserve(self) -> None:
        self._rows = max(self._rows, len(self.lengths))
        self._places = max(self._places, -(-max(self.lengths) // BLOCK) * BLOCK)


@dataclass
class KVCache:
    """The kept keys and values of all layers, for sequences that come and go.

    `add` and `extend` give the step that a forward takes (`models.protocol.DecodingStep`), which fills
    the places that they reserve.
    """

    tokens: Rows = field(default_factory=Rows)
    """Of layers that attend to the text."""
    features: Rows = field(default_factory=Rows)
    """Of layers that attend to images: what the next token reads. Without rows where a model has none."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's sequence."""
        return self.tokens.lengths

    def add(self, prompts: Segments, device: torch.device) -> Prefill:
        """A row for each prompt, behind those that are there."""
        return Prefill(self, self.tokens.add(prompts, device), PackedAttention(prompts, causal=True))

    def extend(self, device: torch.device) -> Extension:
        """One more place for every row."""
        index_B = self.tokens.extend(device)
        return Extension(self, index_B, self.tokens.visible(device))

    def remove(self, row: int) -> None:
        """Drop a sequence; the last row moves to its place."""
        self.tokens.remove(row)
        if self.features.lengths:
            self.features.remove(row)


@dataclass
class Prefill:
    """Whole prompts end to end, each attending to itself and its images as in training."""

    cache: KVCache
    index_T: Tensor
    packed: PackedAttention
    is_prefill: bool = True
    _kept: tuple[Tensor, Tensor] | None = None
    """Which features are kept, and where."""

    def attention(self, layer: int) -> Attend:
        """See `models.protocol.DecodingStep`."""

        def attend(q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor) -> Tensor:
            self.cache.tokens.write(layer, k_TGh, v_TGh, self.index_T)
            attended: Tensor = self.packed(q_THh, k_TGh, v_TGh)
            return attended

        return attend

    def reading(self, layer: int, images: ImageReading | None) -> Reading:
        """See `models.protocol.DecodingStep`."""
        assert images is not None
        if self._kept is None:
            index_F, counts = images.kept()
            self._kept = index_F, self.cache.features.add(counts, index_F.device)
        return _PromptReading(images, self.cache.features, layer, *self._kept)


@dataclass(frozen=True)
class _PromptReading:
    """Reads as the prompts do, and keeps what the tokens after them will read."""

    images: ImageReading
    rows: Rows
    layer: int
    index_F: Tensor
    place_F: Tensor

    @property
    def tokens_R(self) -> Tensor:
        return self.images.tokens_R

    @property
    def num_readers(self) -> int:
        return self.images.num_readers

    def __call__(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        k, v = k_FGh.index_select(0, self.index_F), v_FGh.index_select(0, self.index_F)
        self.rows.write(self.layer, k, v, self.place_F)
        attended: Tensor = self.images(q_RHh, k_FGh, v_FGh)
        return attended


@dataclass
class Extension:
    """One token of every sequence, attending to its own row."""

    cache: KVCache
    index_B: Tensor
    visible_BS: Tensor | None
    is_prefill: bool = False
    _readers: _Readers | None = None

    def attention(self, layer: int) -> Attend:
        """See `models.protocol.DecodingStep`."""

        def attend(q_BHh: Tensor, k_BGh: Tensor, v_BGh: Tensor) -> Tensor:
            rows = self.cache.tokens
            rows.write(layer, k_BGh, v_BGh, self.index_B)
            return attend_to_rows(q_BHh, *rows.kept(layer), self.visible_BS)

        return attend

    def reading(self, layer: int, images: ImageReading | None) -> Reading:
        """See `models.protocol.DecodingStep`."""
        if self._readers is None:
            self._readers = _Readers.of(self.cache.features, self.index_B.device)
        return _RowReading(self.cache.features, layer, self._readers)


@dataclass(frozen=True)
class _Readers:
    """The rows that have features to read, and which places those are."""

    row_R: Tensor
    visible_BS: Tensor | None

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> _Readers:
        having = [row for row, length in enumerate(rows.lengths) if length]
        visible_BS = rows.visible(device)
        if visible_BS is not None:
            # A row without features sees one place, whose values are finite, and what it gets is not used.
            visible_BS = visible_BS | (torch.arange(visible_BS.shape[1], device=device) == 0)
        return cls(torch.tensor(having, dtype=torch.int64, device=device), visible_BS)


@dataclass(frozen=True)
class _RowReading:
    """One token of every sequence that has images, reading the features that are kept of them."""

    rows: Rows
    layer: int
    readers: _Readers

    @property
    def tokens_R(self) -> Tensor:
        return self.readers.row_R

    @property
    def num_readers(self) -> int:
        return len(self.readers.row_R)

    def __call__(self, q_RHh: Tensor, k_FGh: Tensor, v_FGh: Tensor) -> Tensor:
        if not len(q_RHh):
            return q_RHh
        # All rows attend, so that none has to be copied.
        q_BHh = q_RHh.new_zeros(len(self.rows.lengths), *q_RHh.shape[1:])
        q_BHh = q_BHh.index_copy(0, self.readers.row_R, q_RHh)
        out_BHh = attend_to_rows(q_BHh, *self.rows.kept(self.layer), self.readers.visible_BS)
        return out_BHh.index_select(0, self.readers.row_R)


def _grown(kept_BSGh: Tensor, rows: int, places: int) -> Tensor:
    """The same values in a tensor of at least that size; zeros elsewhere, as hidden keys must be finite."""
    old_rows, old_places = kept_BSGh.shape[:2]
    if (old_rows, old_places) == (rows, places):
        return kept_BSGh
    grown = kept_BSGh.new_zeros((rows, places, *kept_BSGh.shape[2:]))
    grown[:old_rows, :old_places] = kept_BSGh
    return grown
