"""Which sample stands at which position: a pure function of (seed, position).

Nothing is shuffled in memory and nothing is remembered, so any worker of any rank can ask for any
position, and a run can be continued anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cantata.core.errors import ConfigError

BLOCK = 1024
"""Positions over which the sources' shares hold exactly."""

ROUNDS = 6
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Place:
    """A sample of the run: the `index` of `source` in that source's `epoch`-th pass."""

    source: str
    index: int
    epoch: int


class Order:
    """The endless, weighted, shuffled order of the samples of several sources.

    Each block of `BLOCK` positions holds a fixed number of samples of each source (its share, rounded) in
    an order of its own. The n-th sample of a source is found by permuting that source's indices anew for
    each epoch, so that every sample comes exactly once before any comes twice. Those of a `sequential`
    source come in its own order, in every epoch the same: a stream need not be read to its end first.

    Raises `ConfigError` where a source is empty or its share is too small to be held.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        seed: int,
        sequential: Collection[str] = (),
    ) -> None:
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"source {name} holds no sample (data.sources.{name})")
        self.seed = seed
        self.names = sorted(sizes)
        self.sizes = [sizes[name] for name in self.names]
        self.sequential = frozenset(sequential)
        self.quotas = apportion([weights[name] for name in self.names], BLOCK)
        for name, quota in zip(self.names, self.quotas, strict=True):
            if quota < 1:
                raise ConfigError(
                    f"data.sources.{name}.weight={weights[name]} is under 1/{BLOCK} of all weights; raise it"
                )
        self._block = lru_cache(maxsize=64)(self._arrange)

    def locate(self, position: int) -> Place:
        """The sample at `position` (0, 1, 2, ...)."""
        block, offset = divmod(position, BLOCK)
        sources, ordinals = self._block(block)
        source = int(sources[offset])
        count = block * self.quotas[source] + int(ordinals[offset])
        epoch, ordinal = divmod(count, self.sizes[source])
        name = self.names[source]
        if name in self.sequential:
            return Place(name, ordinal, epoch)
        return Place(name, permute(ordinal, self.sizes[source], key(self.seed, name, epoch)), epoch)

    def describe(self) -> dict[str, list[int | str]]:
        """Size and share of each source, and which are sequential: equal where two orders are the same."""
        return {
            name: [size, quota, *(["sequential"] if name in self.sequential else [])]
            for name, size, quota in zip(self.names, self.sizes, self.quotas, strict=True)
        }

    def _arrange(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position of a block, and the how-manieth of that source it is there."""
        start = key(self.seed, "block", block)
        noise = mix(np.arange(BLOCK, dtype=np.uint64) + np.uint64(start))
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(noise, kind="stable")]
        ordinals = np.empty(BLOCK, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            ordinals[sources == source] = np.arange(quota)
        return sources, ordinals

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._block = lru_cache(maxsize=64)(self._arrange)


def apportion(weights: list[float], seats: int) -> list[int]:
    """Whole numbers that add up to `seats`, in the proportion of the weights (largest remainders)."""
    total = sum(weights)
    exact = [weight / total * seats for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: seats - sum(counts)]:
        counts[index] += 1
    return counts


def permute(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of 0..size-1 sends `index`, in constant memory.

    A balanced Feistel network over the next power of four, walked until it lands inside `size`
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix(right + key + turn * 0x632BE59BD9B4E019) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=4096)
def key(*parts: object) -> int:
    """64 bits that depend on every part; the same on every machine and version."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
