"""Packed attention against a dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from cantata.core.types import Segments
from cantata.nn.attention import PackedAttention, attend_to_rows, prefix_mask


def dense(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, causal: bool) -> Tensor:
    """The slow twin: all scores, then a mask."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("thd,shd->hts", q[: queries.total], k[: keys.total]) * q.shape[-1] ** -0.5
    allowed = queries.ids()[:, None] == keys.ids()[None]
    if causal:
        allowed &= torch.arange(queries.total)[:, None] >= torch.arange(keys.total)[None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    out = torch.zeros_like(q)
    out[: queries.total] = torch.einsum("hts,shd->thd", weights, v[: keys.total])
    return out


CASES = {
    "ragged": ((3, 1, 7, 2), (3, 1, 7, 2), True),
    "equal": ((4, 4, 4), (4, 4, 4), True),
    "one": ((9,), (9,), True),
    "bidirectional": ((5, 2, 6), (5, 2, 6), False),
    "cross": ((2, 3, 2), (7, 1, 4), False),
    "cross-equal-queries": ((2, 2), (7, 4), False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("padding", [0, 3])
def test_equals_a_dense_mask(case: str, kv_heads: int, padding: int) -> None:
    query_lengths, key_lengths, causal = CASES[case]
    queries, keys = Segments(query_lengths), Segments(key_lengths)
    torch.manual_seed(0)
    q, grad = torch.randn(2, queries.total + padding, 4, 8)
    k, v = torch.randn(2, keys.total + padding, kv_heads, 8)
    results = []
    for attend in (
        PackedAttention(queries, keys, causal=causal),
        lambda *x: dense(*x, queries, keys, causal),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(x.grad for x in leaves)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=2e-6)
    assert not padding or results[0][0][-padding:].count_nonzero() == 0


def test_no_segments_give_zero_gradients() -> None:
    attend = PackedAttention(Segments(()), causal=False)
    leaves = [torch.randn(n, heads, 8, requires_grad=True) for n, heads in ((0, 4), (0, 2), (0, 2))]
    attend(*leaves).sum().backward()
    assert all(x.grad is not None for x in leaves)
    padded = [torch.randn(3, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    out = attend(*padded)
    out.sum().backward()
    assert out.count_nonzero() == 0
    assert all(x.grad is not None and x.grad.count_nonzero() == 0 for x in padded)


def test_half_precision_is_close_to_fp32() -> None:
    segments = Segments((5, 9, 9))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, segments.total, 4, 8)
    attend = PackedAttention(segments, causal=True)
    out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(q, k, v), rtol=0.03, atol=0.03)


def test_unequal_numbers_of_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="1 query segments but 2 key segments"):
        PackedAttention(Segments((3,)), Segments((1, 2)), causal=False)


def test_a_new_layout_is_not_a_new_compilation() -> None:
    counter = CompileCounter()
    q, k, v = torch.randn(3, 12, 4, 8)

    def block(attend: PackedAttention) -> Tensor:
        return attend(q * 2, k, v) + 1

    compiled = torch.compile(block, backend=counter)
    frames = []
    for lengths in ((12,), (5, 7), (3, 3, 3), (1, 10)):
        attend = PackedAttention(Segments(lengths), causal=True)
        torch.testing.assert_close(compiled(attend), block(attend))
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert len(set(frames)) == 1


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(3, 7, 1), (5, 5)])
def test_one_query_to_its_row_is_a_segment_of_one_query(kv_heads: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    longest, count = max(lengths), len(lengths)
    q = torch.randn(count, 4, 8)
    k, v = torch.randn(2, count, longest, kv_heads, 8)
    lengths_B = torch.tensor(lengths)
    visible = torch.arange(longest) < lengths_B[:, None]
    packed = PackedAttention(Segments((1,) * count), Segments(lengths), causal=False)
    expected = packed(q, k[visible], v[visible])
    torch.testing.assert_close(attend_to_rows(q, k, v, visible), expected, atol=1e-6, rtol=0)
    if len(set(lengths)) == 1:
        torch.testing.assert_close(attend_to_rows(q, k, v, None), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lengths", [(4, 4), (3, 5)])
def test_dropout_zeroes_probabilities_and_scales_the_rest(lengths: tuple[int, ...]) -> None:
    """One-hot values show the probabilities: each is 0 or 1 / (1 - p) of what it is without dropout."""
    segments, rate = Segments(lengths), 0.25
    torch.manual_seed(0)
    q, k = torch.randn(8, 40, 8), torch.randn(8, 20, 8)
    v = torch.eye(8)[:, None].expand(8, 20, 8).contiguous()
    expected = PackedAttention(segments, causal=True)(q, k, v)
    found = PackedAttention(segments, causal=True, dropout=rate)(q, k, v)
    kept = found != 0
    torch.testing.assert_close(found[kept], expected[kept] / (1 - rate), rtol=1e-6, atol=1e-7)
    share = kept.sum() / (expected != 0).sum()
    assert abs(float(share) - (1 - rate)) < 0.05


@given(st.lists(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1))
def test_a_prefix_is_seen_whole_and_the_rest_causally(segments: list[tuple[int, int]]) -> None:
    """Who sees whom, by the gradient of each output, against the words of the paper."""
    lengths, prefixes = (Segments(tuple(values)) for values in zip(*segments, strict=True))
    torch.manual_seed(0)
    q, k = torch.randn(2, lengths.total, 1, 4)
    # A value for each key: what comes out says which keys were seen, and how much.
    v = torch.eye(lengths.total)[:, None]
    out = PackedAttention(lengths, causal=True, prefix=prefixes)(q, k, v)[:, 0]
    expected = torch.zeros_like(out)
    start = 0
    for length, prefix in segments:
        for i in range(length):
            seen = [j for j in range(length) if j <= i or j < prefix]
            scores = torch.stack([q[start + i, 0] @ k[start + j, 0] / 2.0 for j in seen])
            for j, share in zip(seen, scores.softmax(0), strict=True):
                expected[start + i, start + j] = share
        start += length
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out > 0, expected > 0)


@given(st.integers(1, 12), st.data())
def test_prefix_masks(length: int, data: st.DataObject) -> None:
    prefix = data.draw(st.integers(1, length))
    mask = prefix_mask(length, prefix)
    assert mask.dtype == torch.bool
    assert all(mask[i, j] == (j <= i or j < prefix) for i in range(length) for j in range(length))
    assert torch.equal(prefix_mask(length, 1), torch.ones(length, length, dtype=torch.bool).tril())
    assert prefix_mask(length, length).all()


def test_prefixes_that_do_not_fit() -> None:
    segments = Segments((3, 4))
    with pytest.raises(ValueError, match="1 prefixes of 2 segments"):
        PackedAttention(segments, causal=True, prefix=Segments((1,)))
    with pytest.raises(ValueError, match="causal=False"):
        PackedAttention(segments, causal=False, prefix=segments)
