"""The end of a language model: final norm, output matrix and loss, for the rows that have a target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cantata.nn.linear_cross_entropy import linear_cross_entropy
from cantata.nn.matmul import linear
from cantata.nn.norm import RMSNorm
from cantata.nn.rows import take_rows


class HeadOutput(NamedTuple):
    """Loss of the rows with targets; logits of all rows if asked."""

    loss_sum: Tensor
    loss_N: Tensor
    logits_TV: Tensor | None


class LanguageHead(nn.Module):
    """RMSNorm, then the output matrix, then cross entropy.

    A tied head owns no matrix: it is handed the embedding's at each call.
    """

    weight: nn.Parameter | None

    def __init__(self, hidden_size: int, vocab_size: int, eps: float, *, tied: bool) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.norm = RMSNorm(hidden_size, eps)
        weight = None if tied else nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.register_parameter("weight", weight)

    def forward(
        self,
        x_TD: Tensor,
        labels_T: Tensor,
        target_index_N: Tensor,
        target_weight_N: Tensor | None,
        tied_weight_VD: Tensor | None,
        with_logits: bool,
    ) -> HeadOutput:
        weight_VD = tied_weight_VD if self.weight is None else self.weight
        assert weight_VD is not None
        logits_TV = None
        if with_logits:
            x_TD = self.norm(x_TD)
            low = self.low_rank(x_TD)
            logits_TV = linear(x_TD, weight_VD)
            rows_ND = take_rows(x_TD, target_index_N)
            if low is not None:
                logits_TV = logits_TV + linear(*low)
                low = take_rows(low[0], target_index_N), low[1]
        else:
            rows_ND = self.norm(take_rows(x_TD, target_index_N))
            low = self.low_rank(rows_ND)
        labels_N = labels_T.index_select(0, target_index_N)
        loss_sum, loss_N = linear_cross_entropy(
            rows_ND, weight_VD, labels_N, target_weight_N, *(low or (None, None))
        )
        return HeadOutput(loss_sum, loss_N, logits_TV)

    def low_rank(self, x_TD: Tensor) -> tuple[Tensor, Tensor] | None:
        """What an adapter adds to the logits of normed rows, as (T, r) and (V, r); None: nothing."""
        return None
