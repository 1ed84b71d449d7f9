"""The text tower: one feature a text, whatever stands beside it in the row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cantata.core.types import Segments
from cantata.models.aimv2.text import TextEmbedding, TextTower
from tests.models.aimv2.small import TEXT, contrastive, pair_batch

TEXTS = ([5, 9, 7, 0], [3, 0], [8, 8, 4, 1, 0])


def packed(*texts: list[int], padding: int = 0) -> tuple[Tensor, Tensor, Segments]:
    ids = torch.tensor([token for text in texts for token in text] + [17] * padding)
    positions = torch.cat([*(torch.arange(len(text)) for text in texts), torch.zeros(padding).long()])
    return ids, positions, Segments(tuple(map(len, texts)))


def tower() -> TextTower:
    return contrastive().text


@torch.no_grad()
def test_tokens_are_placed_in_their_own_text() -> None:
    module, (ids, positions, _) = TextEmbedding(replace(TEXT, vocab_size=20)), packed(*TEXTS)
    expected = [
        module.token_embedding.weight[token] + module.position_embedding.weight[place]
        for text in TEXTS
        for place, token in enumerate(text)
    ]
    assert torch.equal(module(ids, positions), torch.stack(expected))


@torch.no_grad()
def test_a_texts_feature_is_what_stands_at_its_end_behind_the_norm() -> None:
    """Packed, padded, and each text alone through the blocks by hand."""
    module = tower()
    found = module(*packed(*TEXTS, padding=3))
    assert found.shape == (3, TEXT.hidden_size)
    for text, feature in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(module(*packed(text))[0], feature, rtol=0, atol=2e-6)
    seen: list[Tensor] = []
    hook = module.layers[-1].register_forward_hook(lambda *given: seen.append(given[2]))
    module(*packed(TEXTS[0]))
    hook.remove()
    normed = torch.nn.functional.rms_norm(
        seen[0][-1], (TEXT.hidden_size,), module.rms_norm.weight, TEXT.rms_norm_eps
    )
    torch.testing.assert_close(found[0], normed, rtol=0, atol=2e-6)


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    module, seen = tower(), list[Tensor]()
    module.layers[-1].register_forward_hook(lambda *given: seen.append(given[2]))
    module(*packed([5, 9, 7, 0]))
    module(*packed([5, 9, 2, 0]))
    assert ((seen[0] - seen[1]).abs().amax(1) > 0).tolist() == [False, False, True, True]


def test_a_text_reads_forward_and_ends_at_its_end() -> None:
    """Changing a token changes the text's feature; tokens after its end would be another text's."""
    model, batch = contrastive(), pair_batch(2)
    ids = batch.input_ids_T.clone()
    ids[batch.samples.total :] = 17
    with torch.no_grad():
        same = model(replace(batch, input_ids_T=ids)).text_SD
        assert torch.equal(same, model(batch).text_SD)
        ids[1] += 1
        changed = model(replace(batch, input_ids_T=ids)).text_SD
    assert not torch.equal(changed[0], same[0])
    assert torch.equal(changed[1], same[1])
