"""The states of this process' random generators, as tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import torch
from torch import Tensor


def seed_all(seed: int, rank: int) -> None:
    """Start every generator from the run's seed, differently on each rank."""
    random.seed(f"{seed}:{rank}")
    # Distinct for every (seed, rank) that a run can have, so that no rank repeats another run's numbers.
    torch.manual_seed(((seed << 20) + rank) % 2**63)


def capture() -> dict[str, Tensor]:
    """uint8 tensors by generator: torch on the host, torch on this rank's device, Python's own."""
    text = json.dumps(random.getstate()).encode()
    states = {"torch": torch.get_rng_state(), "python": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `capture` made; a device state is left out where there is no such device."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(words), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
