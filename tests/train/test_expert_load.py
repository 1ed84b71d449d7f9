"""Rows that come to one rank: what is seen of them, what a row weighs, and when the user hears of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from cantata.core.types import TokenGroups
from cantata.nn.moe.dispatch import Dispatched, Order
from cantata.nn.moe.experts import Experts
from cantata.train.expert_load import LoadWarning, PeakRows, row_values
from tests.models.aria.small import small_aria, small_layout
from tests.train.test_window import result


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def test_only_training_is_watched_and_the_largest_micro_batch_counts() -> None:
    layers = small_aria(small_layout()).moe_layers()
    peaks = PeakRows(layers)

    def run(tokens: int) -> torch.Tensor:
        zeros_T = torch.zeros(tokens, dtype=torch.int64)
        x_TD = torch.randn(tokens, 32, requires_grad=True)
        for layer in layers:
            x_TD, _ = layer(x_TD, TokenGroups(zeros_T, zeros_T, 1))
        return x_TD

    with torch.no_grad():
        run(50)
    assert peaks.take() == [0, 0]
    for tokens in (7, 11, 9):
        run(tokens).sum().backward()
    top_k, hidden, width = 2, 32, 24
    assert peaks.take() == [11 * top_k] * 2
    assert peaks.row_bytes_L == [4 * (hidden + 2 * width)] * 2
    assert peaks.take() == [0, 0], "what was taken is over"


@pytest.mark.parametrize("rows", [16, 64])
def test_a_row_weighs_what_autograd_keeps_of_it(rows: int) -> None:
    """Every value that forward keeps and that grows with the rows, each storage once."""
    layer = small_aria(small_layout()).moe_layers()[0]
    experts: Experts = layer.experts
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.shape and tensor.shape[0] == rows:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_RD = torch.randn(rows, 32, requires_grad=True)
    index_R = torch.arange(rows)
    counts_E = torch.tensor([rows // 2, 0, rows // 2, 0])
    arrived = Dispatched(x_RD, None, counts_E, Order(index_R, index_R[:, None], index_R), None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = experts(arrived)
    assert sum(kept.values()) == rows * row_values(layer) * 4
    del output


class Peaks:
    """Peaks that are told in advance, a list for each step."""

    row_bytes_L = [2**20] * 6

    def __init__(self, *steps: list[int]) -> None:
        self._steps = iter(steps)

    def take(self) -> list[int]:
        return next(self._steps)


def said(*steps: list[int], threshold: float = 2.0) -> list[list[str]]:
    """The warnings of each step, with an even share of 100 rows."""
    told: list[str] = []
    settings = {"even_rows": 100, "threshold": threshold, "num_experts": 8, "ep": 2, "warn": told.append}
    listener = LoadWarning(Peaks(*steps), **settings)  # type: ignore[arg-type]
    found = []
    for step in range(1, len(steps) + 1):
        listener.after_step(result(step))
        found.append(told.copy())
        told.clear()
    return found


def test_a_layer_is_named_once_and_again_when_it_got_worse() -> None:
    found = said([200, 100], [201, 100], [201, 100], [250, 199], [252, 199], [100, 100], [315, 100], [316, 0])
    assert [len(texts) for texts in found] == [0, 1, 0, 0, 1, 0, 0, 1]
    assert found[1][0].startswith(
        "step 2, layer 0: rank 0 (experts 0 to 3) received 201 rows of tokens in one micro-batch, 2.0 times "
        "the even share of 100; its experts keep 201 MiB of activations in that layer instead of 100 MiB. "
    )


def test_layers_of_one_step_share_a_line_worst_first() -> None:
    (texts,) = said([150, 300, 210, 400, 250, 500])
    assert len(texts) == 1
    assert "step 1, layer 5: rank 0" in texts[0]
    assert "; also in layer 3 (4.0 times), 1 (3.0 times), 4 (2.5 times) and 1 more. Before memory" in texts[0]


def test_the_threshold_decides() -> None:
    assert said([140], [140], threshold=1.5) == [[], []]
    assert len(said([160], threshold=1.5)[0]) == 1
