"""Attention over packed sequences: each segment sees only itself.

S  key tokens    G  key-value heads    B  sequences of a batch that is not packed
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from cantata.core.types import Segments
from cantata.nn.matmul import product_dtype

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries (T, H, h), keys and values (S, G, h) to attended values (T, H, h)."""


class PackedAttention:
    """Block-diagonal softmax attention for one layout of segments, scaled by `head_dim ** -0.5`.

    Made once per forward and handed to every layer. Query segment i attends to key segment i, causally
    if asked; tokens beyond the segments' total get zeros. Key-value heads may be fewer than query heads
    (each serves `H / G` consecutive query heads).

    CUDA in half precision runs the variable-length flash kernel, unless there is dropout or a prefix, which
    that kernel lacks; everything else runs SDPA segment by segment, in one call where all segments are
    equally long.

    dropout: share of the attention probabilities that is zeroed, the rest scaled up to make up for it.
    prefix: where causal, the first tokens of each segment that see one another whole, at least 1 of each.

    Raises `ValueError` where queries and keys, or prefixes, do not have the same number of segments.
    """

    def __init__(
        self,
        queries: Segments,
        keys: Segments | None = None,
        *,
        causal: bool,
        dropout: float = 0.0,
        prefix: Segments | None = None,
    ) -> None:
        self.queries = queries
        self.keys = queries if keys is None else keys
        self.causal = causal
        self.dropout = dropout
        self.prefix = prefix
        self._offsets: tuple[Tensor, Tensor] | None = None
        self._masks: list[Tensor] | None = None
        if prefix is not None and (not causal or len(prefix.lengths) != len(queries.lengths)):
            raise ValueError(f"{len(prefix.lengths)} prefixes of {len(queries.lengths)} segments, {causal=}")
        if len(self.queries.lengths) != len(self.keys.lengths):
            raise ValueError(
                f"{len(queries.lengths)} query segments but {len(self.keys.lengths)} key segments"
            )

    # A compiled block would be compiled again for every new layout of segments.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q_THh: Tensor, k_SGh: Tensor, v_SGh: Tensor) -> Tensor:
        """The attended values, shaped as the queries."""
        q, k, v = q_THh[: self.queries.total], k_SGh[: self.keys.total], v_SGh[: self.keys.total]
        if not q.numel():
            out = q + (k.sum() + v.sum()) * 0
        elif q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and self._has_kernel:
            out = self._varlen(q, k, v)
        else:
            out = self._sdpa(q, k, v)
        padding = q_THh.shape[0] - out.shape[0]
        return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out

    @property
    def _has_kernel(self) -> bool:
        return not self.dropout and self.prefix is None

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._offsets is None:
            self._offsets = (self.queries.offsets(q.device), self.keys.offsets(q.device))
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        lengths = (self.queries.max_length, self.keys.max_length)
        out = varlen_attn(q, k, v, *self._offsets, *lengths, **_causal_argument(self.causal))
        assert isinstance(out, Tensor)
        return out

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype, wide = q.dtype, product_dtype(q)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        if len(set(self.queries.lengths)) == len(set(self.keys.lengths)) == 1:
            count = len(self.queries.lengths)
            mask = None if self.prefix is None else torch.stack(self._visible(q.device))[:, None]
            batch = (_side_by_side(q, count), _side_by_side(k, count), _side_by_side(v, count))
            out = self._one_call(*batch, mask)
            # Contiguous, as from the other path: compiled code checks strides.
            return out.transpose(1, 2).flatten(0, 1).to(dtype).contiguous()
        queries, keys = list(self.queries.lengths), list(self.keys.lengths)
        parts = zip(
            torch.split(q.transpose(0, 1)[None], queries, dim=2),
            torch.split(k.transpose(0, 1)[None], keys, dim=2),
            torch.split(v.transpose(0, 1)[None], keys, dim=2),
            [None] * len(keys) if self.prefix is None else self._visible(q.device),
            strict=True,
        )
        return torch.cat([self._one_call(*part)[0].transpose(0, 1) for part in parts]).to(dtype)

    def _one_call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        causal = self.causal and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout, is_causal=causal, enable_gqa=gqa
        )

    def _visible(self, device: torch.device) -> list[Tensor]:
        """Of each segment which keys a query sees, made once: (length, length), bool."""
        if self._masks is None:
            assert self.prefix is not None
            pairs = zip(self.queries.lengths, self.prefix.lengths, strict=True)
            self._masks = [prefix_mask(length, prefix, device) for length, prefix in pairs]
        return self._masks


def prefix_mask(length: int, prefix: int, device: torch.device | str = "cpu") -> Tensor:
    """Whether query i sees key j: those up to itself, and all of the prefix; bool, (length, length)."""
    index = torch.arange(length, device=device)
    return index <= index[:, None].clamp_min(prefix - 1)


def attend_to_rows(q_BHh: Tensor, k_BSGh: Tensor, v_BSGh: Tensor, visible_BS: Tensor | None) -> Tensor:
    """One query of each of B sequences to its own keys, scaled by `head_dim ** -0.5`: (B, H, h).

    Keys that `visible_BS` hides must be finite all the same; None shows all. Each key-value head serves
    `H / G` consecutive query heads, which go through as so many queries of one head: no key is repeated.
    """
    q = q_BHh.to(k_BSGh.dtype).view(len(q_BHh), k_BSGh.shape[2], -1, q_BHh.shape[-1])
    mask = None if visible_BS is None else visible_BS[:, None, None]
    keys, values = k_BSGh.transpose(1, 2), v_BSGh.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return out.flatten(1, 2).to(q_BHh.dtype)


def _side_by_side(x: Tensor, count: int) -> Tensor:
    """Packed segments of one length as a batch: (count, heads, length, head_dim)."""
    return x.view(count, -1, *x.shape[1:]).transpose(1, 2)


@cache
def _causal_argument(causal: bool) -> dict[str, Any]:
    """How this torch's `varlen_attn` is told to be causal: by a flag in 2.11, by a window in 2.13."""
    if "window_size" in inspect.signature(varlen_attn).parameters:
        return {"window_size": (-1, 0 if causal else -1)}
    return {"is_causal": causal}
