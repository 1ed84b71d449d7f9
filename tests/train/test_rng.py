"""What was drawn after a capture is drawn again after a restore."""

from __future__ import annotations

import random

import torch

from cantata.train import rng


def test_torch_and_python_come_back() -> None:
    # An odd number of Gaussian draws leaves one in Python's generator.
    random.gauss(0.0, 1.0)
    states = rng.capture()
    assert {state.dtype for state in states.values()} == {torch.uint8}
    drawn = torch.rand(3), random.gauss(0.0, 1.0), random.random()
    rng.restore(states)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.gauss(0.0, 1.0), random.random()) == drawn[1:]


def test_a_seed_and_a_rank_start_every_generator() -> None:
    def drawn(seed: int, rank: int) -> tuple[float, float]:
        rng.seed_all(seed, rank)
        return torch.rand(()).item(), random.random()

    assert drawn(1, 0) == drawn(1, 0)
    values = [value for pair in (drawn(1, 0), drawn(1, 1), drawn(2, 0)) for value in pair]
    assert len(set(values)) == len(values)
