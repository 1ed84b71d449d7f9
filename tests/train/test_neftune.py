"""Noise on token embeddings: where, how much, when, and the same again from the same random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import IMAGE, TEXT
from cantata.train.neftune import add_noise
from tests.train.standin import StandIn, pack

D = 64
BATCH = pack([(TEXT, [1] * 100), (IMAGE, [2] * 25)], padding=7)


class Embeds(nn.Module):
    """Ones for every token; what comes out of the embedding is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(10, D)
        nn.init.ones_(self.token_embedding.weight)

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.token_embedding(batch.input_ids_T)
        return out


def noisy(alpha: float = 5.0) -> Embeds:
    model = Embeds()
    add_noise(model, alpha)
    return model


def test_the_bound_is_alpha_over_the_root_of_the_samples_length_times_width() -> None:
    noise_TD = (noisy()(BATCH) - 1).detach()
    for rows, length in ((slice(0, 100), 100), (slice(100, 125), 25)):
        bound = 5.0 / (length * D) ** 0.5
        found = noise_TD[rows]
        assert found.abs().max() <= bound * 1.001
        # Uniform: mean 0 and a third of the bound's square, over more than a thousand draws.
        assert abs(found.mean()) < 0.05 * bound
        assert found.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.1)
    assert (noise_TD[125:] == 0).all(), "padding has none"


def test_the_same_random_state_gives_the_same_noise_and_the_next_draw_another() -> None:
    model = noisy()
    torch.manual_seed(3)
    first, second = model(BATCH), model(batch=BATCH)
    torch.manual_seed(3)
    assert torch.equal(model(BATCH), first)
    assert not torch.equal(first, second)


def test_evaluation_has_none_and_draws_nothing() -> None:
    model = noisy().eval()
    before = torch.get_rng_state()
    assert (model(BATCH) == 1).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_pass_as_without_noise() -> None:
    model = noisy()
    model(BATCH).sum().backward()
    expected = torch.zeros(10).index_add(0, BATCH.input_ids_T, torch.ones(132))
    assert torch.equal(model.token_embedding.weight.grad, expected[:, None].expand(10, D))


def test_no_alpha_no_hook() -> None:
    assert not noisy(0.0)._forward_pre_hooks


def test_a_model_must_name_its_embedding() -> None:
    with pytest.raises(ConfigError, match="StandIn does not name its token embedding"):
        add_noise(StandIn(), 5.0)
