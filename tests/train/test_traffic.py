"""Traffic against what the real dispatcher sends."""

from __future__ import annotations

import pytest
import torch

from cantata.nn.moe import exchange
from cantata.parallel.recompute import Recompute
from cantata.train.dry_run import peak_activation_bytes
from cantata.train.one_rank import on_one_rank
from cantata.train.traffic import traffic
from tests.train.test_dry_run import batch, build, nothing

META = torch.device("meta")


def test_one_rank_sends_nothing() -> None:
    assert traffic(build("meta"), 1, 256, torch.bfloat16, Recompute.none, 1) is None


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("recompute", Recompute)
def test_the_exchange_sends_what_was_said(
    ep: int, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = traffic(build("meta"), ep, 256, torch.bfloat16, recompute, 3)
    assert said is not None
    sent: list[int] = []
    buffers: list[int] = []
    start = exchange._exchange

    def counting(rows: torch.Tensor, splits: exchange.Splits, group: object) -> torch.Tensor:
        started = start(rows, splits, group)  # type: ignore[arg-type]
        if rows.is_floating_point():
            row = rows[0].numel() * rows.element_size()
            sent.append(sum(splits.leaving[1:]) * row)
            buffers.append((sum(splits.leaving) + sum(splits.arriving)) * row)
        return started

    monkeypatch.setattr(exchange, "_exchange", counting)
    peak_activation_bytes(on_one_rank(build("meta"), ep), batch(), torch.bfloat16, recompute, META, nothing)
    assert set(sent) == {said.bytes_each}
    assert set(buffers) == {said.buffer_bytes}
    # What recomputation keeps is not sent again, though this counter sees the call.
    calls = len(sent) if recompute is not Recompute.selective else len(sent) * 2 // 3
    assert said.per_step == 3 * calls
    assert said.bytes_per_step == said.bytes_each * said.per_step
