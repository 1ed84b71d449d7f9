"""Reading without masks against attention with the whole mask, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cantata.core.types import Segments
from cantata.nn.cross_attention import CrossAttention, ImageReading, find_documents

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 8

BATCHES = {
    "two images, then none, then neighbours": (
        (7, 5, 9),
        (1, 4, 12, 13, 14),
        (6, 4, 3, 5, 6),
        (3, 4, 3, 2, 6),
    ),
    "an image at either end": ((4, 6), (0, 9), (2, 3), (2, 3)),
    "one document": ((6,), (2,), (4,), (1,)),
    "equal": ((5, 5), (1, 6), (3, 3), (3, 3)),
    "no image": ((3, 4), (), (), ()),
}
"""Tokens of each document, placeholders, features and readable features of each image; padding follows."""


def mask(
    samples: Segments, first: tuple[int, ...], features: tuple[int, ...], readable: tuple[int, ...]
) -> Tensor:
    """Which feature each token reads, by walking through every document."""
    total = samples.total
    seen = torch.zeros(total, sum(features), dtype=torch.bool)
    starts = [sum(features[:i]) for i in range(len(features))]
    start = 0
    for length in samples.lengths:
        open_: list[int] = []
        for token in range(start, start + length):
            if token in first:
                image = first.index(token)
                open_ = [*open_, image] if token - 1 in first and token > start else [image]
            for image in open_:
                seen[token, starts[image] : starts[image] + readable[image]] = True
        start += length
    return seen


def slow(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / SIZE**0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("before", [False, True])
def test_equals_attention_with_a_mask(batch: str, before: bool) -> None:
    lengths, first, features, readable = BATCHES[batch]
    samples = Segments(lengths)
    reading = ImageReading(samples, first, Segments(features), readable, before=before, device=CPU)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples.total + 3, HEADS, SIZE, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(sum(features), KV_HEADS, SIZE, generator=generator, requires_grad=True) for _ in range(2)
    )
    seen = mask(samples, first, features, readable)
    readers = seen.any(1).nonzero().flatten()
    assert sorted(reading.tokens_R[: reading.num_readers].tolist()) == readers.tolist()
    if before:
        for document in find_documents(samples, first):
            if document.groups:
                ahead = slice(document.start, document.groups[0].first_token)
                whole = [i for group in document.groups for i in group.images]
                begin = sum(features[: whole[0]])
                seen[ahead, begin : begin + sum(features[i] for i in whole)] = True
    assert sorted(reading.tokens_R.tolist()) == seen.any(1).nonzero().flatten().tolist()
    found = reading(x[reading.tokens_R], k, v)
    expected = slow(x[reading.tokens_R], k, v, seen[reading.tokens_R])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weights = torch.randn(found.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (x, k, v)),
        torch.autograd.grad((expected * weights).sum(), (x, k, v), allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_what_is_kept_is_what_the_next_token_would_read() -> None:
    lengths, first, features, readable = BATCHES["two images, then none, then neighbours"]
    samples = Segments(lengths)
    reading = ImageReading(samples, first, Segments(features), readable, before=False, device=CPU)
    index_F, counts = reading.kept()
    last = torch.tensor([sum(lengths[: i + 1]) - 1 for i in range(len(lengths))])
    seen = mask(samples, first, features, readable)[last]
    assert counts.lengths == tuple(seen.sum(1).tolist()) == (4, 0, 11)
    assert index_F.tolist() == seen.nonzero()[:, 1].tolist()


@pytest.mark.parametrize("first", [(2, 2), (4, 1), (1, 9)])
def test_placeholders_out_of_order_or_outside(first: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not in order, or beyond 9 tokens"):
        ImageReading(Segments((5, 4)), first, Segments((2, 2)), (2, 2), before=False, device=CPU)


def test_every_image_needs_its_placeholder() -> None:
    with pytest.raises(ValueError, match="2 images, but 1 placeholders"):
        ImageReading(Segments((5,)), (1,), Segments((2, 2)), (2, 2), before=False, device=CPU)


def test_the_layer_without_images_keeps_its_gradients_zero() -> None:
    """So that a rank without images has something to reduce for every parameter."""
    layer = CrossAttention(HEADS * SIZE, HEADS, KV_HEADS, SIZE, 1e-5)
    reading = ImageReading(Segments((3,)), (), Segments(()), (), before=False, device=CPU)
    x = torch.randn(3, HEADS * SIZE)[reading.tokens_R]
    layer(x, torch.empty(0, HEADS * SIZE), reading).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_the_layer_norms_queries_and_keys_by_head() -> None:
    layer = CrossAttention(HEADS * SIZE, HEADS, KV_HEADS, SIZE, 1e-5)
    reading = ImageReading(Segments((4,)), (1,), Segments((5,)), (5,), before=False, device=CPU)
    x, features = torch.randn(3, HEADS * SIZE), torch.randn(5, HEADS * SIZE)
    q = F.rms_norm(layer.q_proj(x).view(3, HEADS, SIZE), (SIZE,), eps=1e-5)
    k = F.rms_norm(layer.k_proj(features).view(5, KV_HEADS, SIZE), (SIZE,), eps=1e-5)
    out = slow(q, k, layer.v_proj(features).view(5, KV_HEADS, SIZE), torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(layer(x, features, reading), layer.o_proj(out.flatten(1)), atol=1e-6, rtol=0)
