"""The grouped operator of low rank; the grouped experts stand beside the looped ones in `test_experts`."""

from __future__ import annotations

import torch
from torch import library

from cantata.nn.moe.grouped import grouped_low_rank


def test_the_product_of_low_rank_equals_a_loop_and_keeps_torchs_rules() -> None:
    torch.manual_seed(0)
    x_RI, a_EIr, b_ErO = torch.randn(9, 8), torch.randn(3, 8, 4), torch.randn(3, 4, 12)
    lengths = [4, 0, 5]
    ends_E = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    found = grouped_low_rank(x_RI, a_EIr, b_ErO, ends_E)
    expected = [x @ a @ b for x, a, b in zip(x_RI.split(lengths), a_EIr, b_ErO, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected))
    library.opcheck(
        grouped_low_rank, (x_RI, a_EIr, b_ErO, ends_E), test_utils=("test_schema", "test_faketensor")
    )
