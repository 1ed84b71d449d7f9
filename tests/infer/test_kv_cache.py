"""Rows of keys and values that grow, move and are read again."""

from __future__ import annotations

import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.infer.kv_cache import BLOCK, KVCache
from cantata.nn.attention import PackedAttention

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 8


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(tokens, HEADS, SIZE), random(tokens, KV_HEADS, SIZE), random(tokens, KV_HEADS, SIZE)


def test_a_sequence_longer_than_a_block_is_moved_whole() -> None:
    cache, tokens = KVCache(), BLOCK + 3
    q, k, v = qkv(tokens)
    start = BLOCK - 2
    cache.add(Segments((start,)), CPU).attention(0)(q[:start], k[:start], v[:start])
    expected = PackedAttention(Segments((tokens,)), causal=True)(q, k, v)
    for at in range(start, tokens):
        one = slice(at, at + 1)
        found = cache.extend(CPU).attention(0)(q[one], k[one], v[one])
        torch.testing.assert_close(found, expected[one], atol=1e-6, rtol=0)
    assert cache.lengths == [tokens]


def test_the_last_row_takes_the_place_of_one_that_leaves() -> None:
    cache, lengths = KVCache(), (3, 5, 2)
    q, k, v = qkv(sum(lengths))
    cache.add(Segments(lengths), CPU).attention(7)(q, k, v)
    cache.remove(0)
    assert cache.lengths == [2, 5]
    new_q, new_k, new_v = qkv(2)
    found = cache.extend(CPU).attention(7)(new_q, new_k, new_v)
    for row, start, length in ((0, 8, 2), (1, 3, 5)):
        whole = slice(start, start + length)
        keys, values = torch.cat((k[whole], new_k[row, None])), torch.cat((v[whole], new_v[row, None]))
        queries = torch.cat((q[whole], new_q[row, None]))
        expected = PackedAttention(Segments((length + 1,)), causal=True)(queries, keys, values)[-1]
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=0)


def test_what_a_row_held_before_is_not_seen_again() -> None:
    cache = KVCache()
    q, k, v = qkv(9)
    cache.add(Segments((6, 3)), CPU).attention(0)(q, torch.full_like(k, 1e4), torch.full_like(v, 1e4))
    cache.remove(0)
    cache.remove(0)
    cache.add(Segments((2, 4)), CPU).attention(0)(q[:6], k[:6], v[:6])
    found = cache.extend(CPU).attention(0)(q[6:8], k[6:8], v[6:8])
    assert found.abs().max() < 10
