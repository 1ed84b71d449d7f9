"""Keys and values of sequences that are being generated, so that a new token costs one token.

    B  sequences, one row each    S  places of a row    G  key-value heads

A row is a sequence; its places are its tokens. Rows stand side by side in one tensor for keys and one for
values in each layer, made when the layer first runs and grown in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.nn.attention import Attend, PackedAttention, attend_to_rows
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
class KVCache:
    """The kept keys and values of all layers, for sequences that come and go.

    `add` and `extend` give the step that a forward takes (`models.protocol.DecodingStep`), which fills
    the places that they reserve.
    """

    lengths: list[int] = field(default_factory=list)
    """Tokens of each row's sequence."""
    _layers: dict[int, LayerCache] = field(default_factory=dict)
    _rows: int = 0
    _places: int = 0

    def add(self, prompts: Segments, device: torch.device) -> Prefill:
        """A row for each prompt, behind those that are there."""
        first = len(self.lengths)
        self.lengths += prompts.lengths
        self._reserve()
        row_T = first + prompts.ids(device)
        place_T = torch.cat([torch.arange(length, device=device) for length in prompts.lengths])
        return Prefill(self, row_T * self._places + place_T, PackedAttention(prompts, causal=True))

    def extend(self, device: torch.device) -> Extension:
        """One more place for every row."""
        before, longest = self.lengths, max(self.lengths) + 1
        self.lengths = [length + 1 for length in before]
        self._reserve()
        place_B = torch.tensor(before, device=device)
        row_B = torch.arange(len(before), device=device)
        visible_BS = None
        if len(set(before)) > 1:
            visible_BS = torch.arange(longest, device=device) <= place_B[:, None]
        return Extension(self, row_B * self._places + place_B, visible_BS, longest)

    def remove(self, row: int) -> None:
        """Drop a sequence; the last row moves to its place."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self._layers.values():
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def write(self, layer: int, k_TGh: Tensor, v_TGh: Tensor, index_T: Tensor) -> LayerCache:
        """Keep the tokens' keys and values of a layer; returns all that it keeps."""
        if layer not in self._layers:
            self._layers[layer] = LayerCache.empty(k_TGh)
        kept = self._layers[layer]
        kept.write(k_TGh, v_TGh, index_T, self._rows, self._places)
        return kept

    def _reserve(self) -> None:
        self._rows = max(self._rows, len(self.lengths))
        self._places = max(self._places, -(-max(self.lengths) // BLOCK) * BLOCK)


@dataclass(frozen=True)
class Prefill:
    """Whole prompts end to end, each attending to itself as in training."""

    cache: KVCache
    index_T: Tensor
    packed: PackedAttention
    is_prefill: bool = True

    def attention(self, layer: int) -> Attend:
        """See `models.protocol.DecodingStep`."""

        def attend(q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor) -> Tensor:
            self.cache.write(layer, k_TGh, v_TGh, self.index_T)
            attended: Tensor = self.packed(q_THh, k_TGh, v_TGh)
            return attended

        return attend


@dataclass(frozen=True)
class Extension:
    """One token of every sequence, attending to its own row."""

    cache: KVCache
    index_B: Tensor
    visible_BS: Tensor | None
    longest: int
    is_prefill: bool = False

    def attention(self, layer: int) -> Attend:
        """See `models.protocol.DecodingStep`."""

        def attend(q_BHh: Tensor, k_BGh: Tensor, v_BGh: Tensor) -> Tensor:
            kept = self.cache.write(layer, k_BGh, v_BGh, self.index_B)
            rows = slice(len(q_BHh)), slice(self.longest)
            return attend_to_rows(q_BHh, kept.k_BSGh[rows], kept.v_BSGh[rows], self.visible_BS)

        return attend


def _grown(kept_BSGh: Tensor, rows: int, places: int) -> Tensor:
    """The same values in a tensor of at least that size; zeros elsewhere, as hidden keys must be finite."""
    old_rows, old_places = kept_BSGh.shape[:2]
    if (old_rows, old_places) == (rows, places):
        return kept_BSGh
    grown = kept_BSGh.new_zeros((rows, places, *kept_BSGh.shape[2:]))
    grown[:old_rows, :old_places] = kept_BSGh
    return grown
