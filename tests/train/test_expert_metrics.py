"""Balance figures against a version written out with plain numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cantata.train.expert_metrics import expert_metrics, specialisation

LAYERS, MODALITIES = 2, ("text", "image", "video")


def slow_balance(counts: list[int]) -> dict[str, float]:
    total = sum(counts)
    entropy = 0.0
    for count in counts:
        if count:
            entropy -= count / total * math.log(count / total)
    return {
        "load_max": max(counts) / (total / len(counts)),
        "load_mean": sum(count * (count / (total / len(counts))) for count in counts) / total,
        "dead_share": len([count for count in counts if count == 0]) / len(counts),
        "entropy": entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
    }


def slow_specialisation(by_modality: list[list[int]]) -> float | None:
    shares = [[count / sum(row) for count in row] for row in by_modality if sum(row)]
    if len(shares) < 2:
        return None
    divergence = 0.0
    for share in shares:
        for expert, part in enumerate(share):
            mean = sum(other[expert] for other in shares) / len(shares)
            if part:
                divergence += part * math.log(part / mean) / len(shares)
    return divergence / math.log(len(shares))


def slow_expert_metrics(counts: list[list[list[int]]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    result: dict[str, float] = {}
    for layer, by_modality in enumerate(counts):
        views = {"": [sum(column) for column in zip(*by_modality, strict=True)]}
        for modality, row in zip(MODALITIES, by_modality, strict=True):
            views["/" + modality] = row
        index = slow_specialisation(by_modality)
        for view, row in views.items():
            if sum(row) == 0:
                continue
            extra = {"specialisation": index} if view == "" and index is not None else {}
            for name, value in (slow_balance(row) | extra).items():
                result[f"experts/{name}{view}/layer_{layer:02d}"] = value
                values.setdefault(f"experts/{name}{view}", []).append(value)
    return result | {name: sum(layers) / len(layers) for name, layers in values.items()}


def counts_of(num_experts: int) -> st.SearchStrategy[list[list[list[int]]]]:
    row = st.lists(st.one_of(st.just(0), st.integers(0, 10**9)), min_size=num_experts, max_size=num_experts)
    modalities = st.lists(row, min_size=3, max_size=3)
    return st.lists(modalities, min_size=LAYERS, max_size=LAYERS)


@given(st.integers(1, 6).flatmap(counts_of))
def test_equals_the_slow_version(counts: list[list[list[int]]]) -> None:
    assert expert_metrics(torch.tensor(counts)) == pytest.approx(
        slow_expert_metrics(counts), rel=1e-12, abs=1e-12
    )


def test_even_and_collapsed_routing() -> None:
    even = torch.zeros(1, 3, 8, dtype=torch.int64)
    even[0, 0] = 5
    metrics = expert_metrics(even)
    assert metrics["experts/load_max/text/layer_00"] == 1.0
    assert metrics["experts/dead_share"] == 0.0
    assert metrics["experts/entropy"] == pytest.approx(1.0)
    assert not any("image" in name or "video" in name for name in metrics)

    collapsed = torch.zeros(1, 3, 8, dtype=torch.int64)
    collapsed[0, 1, 3] = 77
    metrics = expert_metrics(collapsed)
    assert metrics["experts/load_max/image"] == metrics["experts/load_mean/image"] == 8.0
    assert metrics["experts/dead_share/image/layer_00"] == 7 / 8
    assert metrics["experts/entropy/layer_00"] == 0.0
    assert not any("text" in name for name in metrics)


def test_specialisation_from_alike_to_apart() -> None:
    alike, apart, between = ([[10, 20, 0], [1, 2, 0]], [[5, 5, 0], [0, 0, 900]], [[10, 0], [10, 10]])
    alone = [[1, 2, 3], [0, 0, 0]]
    assert specialisation(torch.tensor(alike)) == pytest.approx(0.0, abs=1e-12)
    assert specialisation(torch.tensor(apart)) == pytest.approx(1.0)
    # H(3/4, 1/4) - (0 + log 2) / 2, over log 2.
    wanted = (math.log(4) - 0.75 * math.log(3)) / math.log(2) - 0.5
    assert specialisation(torch.tensor(between)) == pytest.approx(wanted)
    assert specialisation(torch.tensor(alone)).isnan()
    three = torch.eye(3, dtype=torch.int64)
    assert specialisation(three) == pytest.approx(1.0), "1 is the maximum, however many modalities there are"


def test_without_any_token_nothing_is_said() -> None:
    assert expert_metrics(torch.zeros(2, 3, 4, dtype=torch.int64)) == {}
