"""How many samples were left out, by source and reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def sum_drops(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Add up counts of dropped samples by source and reason."""
    total: dict[str, dict[str, int]] = {}
    for one in counts:
        for source, reasons in one.items():
            for reason, number in reasons.items():
                total.setdefault(source, {}).setdefault(reason, 0)
                total[source][reason] += number
    return total
