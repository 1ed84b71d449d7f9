"""Which token comes next: as transformers filters, and drawn as often as it is likely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.infer.sampling import SamplingConfig, draw, keep_top_k, keep_top_p, next_tokens, penalize

ROWS, VOCABULARY = 5, 40


def config(**changes: Any) -> SamplingConfig:
    settings = {
        "max_new_tokens": 4,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "stop": (),
        "seed": 0,
    }
    return SamplingConfig(**(settings | changes))


@pytest.fixture
def logits() -> Tensor:
    values = 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    values[0, :4] = values[0].max()
    values[1] = 0.0
    values[2, 7] = -torch.inf
    return values


@pytest.mark.parametrize("top_k", [1, 3, 39, 40, 500])
def test_top_k(logits: Tensor, top_k: int) -> None:
    process = pytest.importorskip("transformers").TopKLogitsWarper(top_k)
    assert torch.equal(keep_top_k(logits, top_k), process(None, logits))


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(logits: Tensor, top_p: float) -> None:
    process = pytest.importorskip("transformers").TopPLogitsWarper(top_p)
    assert torch.equal(keep_top_p(logits, top_p), process(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(logits: Tensor, penalty: float) -> None:
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty)
    ids = torch.randint(VOCABULARY, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(penalize(logits, seen, penalty), process(ids, logits.clone()))


def test_what_is_drawn_is_what_all_filters_in_transformers_order_leave(logits: Tensor) -> None:
    """Draws spread evenly over the line hit each token as often as its probability says."""
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[3, 5, 5]])
    kept = transformers.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits[4:].clone())
    for process in (
        transformers.TemperatureLogitsWarper(1.7),
        transformers.TopKLogitsWarper(12),
        transformers.TopPLogitsWarper(0.8),
    ):
        kept = process(ids, kept)
    count = 20_000
    seen = torch.zeros(count, VOCABULARY, dtype=torch.bool)
    seen[:, [3, 5]] = True
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    settings = config(temperature=1.7, top_k=12, top_p=0.8, repetition_penalty=1.4)
    found = next_tokens(logits[4:].expand(count, -1), seen, draws, settings)
    share = torch.bincount(found, minlength=VOCABULARY) / count
    torch.testing.assert_close(share, kept[0].softmax(-1), atol=2 / count, rtol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-42, 1e-60])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3}])
def test_the_coldest_temperatures_draw_the_likeliest(
    logits: Tensor, temperature: float, filters: dict[str, Any]
) -> None:
    draws = torch.full((ROWS - 2,), 0.4, dtype=torch.float64)
    logits[2:, 9] = 11.0
    found = next_tokens(logits[2:], None, draws, config(temperature=temperature, **filters))
    assert found.tolist() == [9] * (ROWS - 2)


def test_the_hottest_temperatures_keep_out_what_must_not_come(logits: Tensor) -> None:
    draws = (torch.arange(VOCABULARY - 1, dtype=torch.float64) + 0.5) / (VOCABULARY - 1)
    found = next_tokens(logits[2].expand(len(draws), -1), None, draws, config(temperature=1e60))
    assert found.tolist() == [token for token in range(VOCABULARY) if token != 7]


def test_the_ends_of_the_line_fall_on_tokens_that_can_come() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2**-53, 3)):
        assert draw(probabilities, torch.tensor([number], dtype=torch.float64)).item() == token


def test_greedy_takes_the_likeliest_after_the_penalty(logits: Tensor) -> None:
    draws = torch.zeros(ROWS, dtype=torch.float64)
    assert torch.equal(next_tokens(logits, None, draws, config()), logits.argmax(-1))
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[3, logits[3].argmax()] = True
    found = next_tokens(logits, seen, draws, config(repetition_penalty=100.0))
    assert found[3] == logits[3].topk(2).indices[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"top_k": 3}, "set temperature above 0"),
        ({"stop": ("a", "")}, "a stop text is empty"),
    ],
)
def test_values_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
