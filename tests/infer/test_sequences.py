"""The cache is an exact shortcut: logits at every step are those of running everything again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.core.samples import Sample
from cantata.infer import kv_cache
from cantata.infer.sequences import CachedSequences, RepeatedSequences, Sequences, open_sequences
from cantata.models.aria import Aria
from cantata.models.protocol import Decodes
from tests.infer.test_generate import COLLATOR, PROMPTS, Counter, aria, text


@pytest.fixture(scope="module")
def model() -> Aria:
    return aria().eval()


@torch.no_grad()
def play(sequences: Sequences, prompts: list[Sample]) -> list[Tensor]:
    """Comings and goings: two prompts, steps, another two, one leaves, steps, the first leaves, steps."""
    logits = [sequences.add(prompts[:2]), sequences.extend([11, 12]), sequences.extend([13, 14])]
    logits += [sequences.add(prompts[2:]), sequences.extend([15, 16, 17, 18])]
    sequences.remove(1)
    logits += [sequences.extend([19, 20, 21]) for _ in range(3)]
    sequences.remove(0)
    sequences.remove(1)
    return [*logits, sequences.extend([22]), sequences.add([prompts[0]]), sequences.extend([23, 24])]


@pytest.mark.parametrize("block", [1, 4, 256])
def test_cached_is_uncached(model: Aria, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", block)
    cached, repeated = (play(kind(model, COLLATOR), PROMPTS) for kind in (CachedSequences, RepeatedSequences))
    assert [len(logits) for logits in cached] == [2, 2, 2, 2, 4, 3, 3, 3, 1, 1, 2]
    for ours, slow in zip(cached, repeated, strict=True):
        # Products of one row and of many round otherwise: by 1.05e-6 here; both are 4.5e-6 from fp64.
        torch.testing.assert_close(ours, slow, atol=2e-6 * float(slow.abs().max()), rtol=0)


@torch.no_grad()
def test_in_bf16_it_is_as_near_as_bf16_is() -> None:
    model = aria().bfloat16().eval()
    cached, repeated = (play(kind(model, COLLATOR), PROMPTS) for kind in (CachedSequences, RepeatedSequences))
    assert cached[0].dtype == torch.bfloat16
    # Now and then rounding sends a token to another expert, of which the median difference knows nothing.
    errors = torch.cat([(a - b).abs().flatten() for a, b in zip(cached, repeated, strict=True)]).float()
    assert errors.median() < 0.02 * max(float(logits.abs().max()) for logits in repeated)


@torch.no_grad()
def test_a_step_runs_one_token_of_each_and_no_tower(model: Aria) -> None:
    sequences = CachedSequences(model, COLLATOR)
    sequences.add(PROMPTS)
    seen: list[int] = []
    hooks = [
        model.text.layers[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))),
        model.vision.register_forward_pre_hook(lambda *_: seen.append(-1)),
    ]
    sequences.extend([1] * len(PROMPTS))
    for hook in hooks:
        hook.remove()
    assert seen == [len(PROMPTS)]


def test_logits_of_a_prompt_are_those_of_its_last_token_alone(model: Aria) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.head.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    with torch.no_grad():
        CachedSequences(model, COLLATOR).add(PROMPTS)
    hook.remove()
    assert shapes == [(len(PROMPTS), 32)]


def test_a_family_without_a_cache_runs_everything_again(model: Aria) -> None:
    assert isinstance(model, Decodes)
    assert isinstance(open_sequences(model, COLLATOR), CachedSequences)
    counter = Counter().eval()
    sequences = open_sequences(counter, COLLATOR)
    assert isinstance(sequences, RepeatedSequences)
    assert sequences.add([text(5, 17), text(25)]).argmax(-1).tolist() == [18, 26]
    assert sequences.extend([18, 26]).argmax(-1).tolist() == [19, 27]
    sequences.remove(0)
    assert sequences.extend([27]).argmax(-1).tolist() == [28]
    assert counter.seen == [(2, 1), (3, 2), (3,)]
