"""How many samples were read, and how many left out, by source and reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Drops = Mapping[str, Mapping[str, int]]
"""Samples left out, by source and reason."""


def sum_drops(counts: Iterable[Drops]) -> dict[str, dict[str, int]]:
    """Add up counts of dropped samples by source and reason."""
    total: dict[str, dict[str, int]] = {}
    for one in counts:
        for source, reasons in one.items():
            for reason, number in reasons.items():
                total.setdefault(source, {}).setdefault(reason, 0)
                total[source][reason] += number
    return total


def sum_reads(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up counts of samples read, by source."""
    total: dict[str, int] = {}
    for one in counts:
        for source, number in one.items():
            total[source] = total.get(source, 0) + number
    return total
