"""What every quantiser begins with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.nn.quantize.base import Quantized, Quantizer, usage


class Signs(Quantizer):
    """One bit a row; it learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.num_codes = 1, 2

    def forward(self, z_ND: Tensor) -> Quantized:
        indices_N = (z_ND[:, 0] > 0).long()
        return Quantized(self.decode(indices_N), indices_N, z_ND.new_zeros(()), {}, usage(indices_N, 2), {})

    def decode(self, indices_N: Tensor) -> Tensor:
        return indices_N[:, None] * 2.0 - 1.0


def test_a_quantiser_without_more_has_one_codebook_its_own_name_and_nothing_to_fill_or_update() -> None:
    quantizer = Signs()
    assert (quantizer.num_codebooks, quantizer.rule) == (1, "Signs")
    quantizer.update({})
    with pytest.raises(KeyError, match="codebook"):
        quantizer.init_parameter("codebook", torch.zeros(1), torch.Generator())


def test_one_that_cannot_quantise_is_none() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Quantizer()  # type: ignore[abstract]


def test_usage_counts_rows_by_code() -> None:
    indices_N = torch.tensor([3, 0, 3, 3, 1])
    found = usage(indices_N, 5)
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 1, 0, 3, 0]
    assert usage(indices_N[:0], 5).tolist() == [0] * 5


def test_usage_counts_each_codebook_by_itself() -> None:
    indices_NR = torch.tensor([[0, 1], [0, 0], [2, 1]])
    assert usage(indices_NR, 3).tolist() == [[2, 0, 1], [1, 2, 0]]


def test_usage_runs_without_values() -> None:
    found = usage(torch.empty(4, dtype=torch.int64, device="meta"), 7)
    assert (found.is_meta, tuple(found.shape)) == (True, (7,))
