"""The draw of a step's rows: by priority, the same however the rows are dealt."""

from __future__ import annotations

import torch

from cantata.nn.quantize.candidates import CandidateRows, _mix, _priorities
from tests.nn.quantize.small import rows


def test_draws_the_rows_of_the_lowest_priorities() -> None:
    step, candidates = torch.tensor(8), CandidateRows(5)
    groups = [rows(4, seed=group).detach() for group in range(3)]
    for group in groups:
        candidates.add(group, step)
    drawn_CD, count = candidates.take(groups[0][0])
    priority = torch.cat([_priorities(step, number, 4) for number in range(3)]).tolist()
    order = sorted(range(12), key=lambda n: priority[n])[:5]
    assert drawn_CD.tolist() == torch.cat(groups)[order].tolist()
    assert count == 5

    candidates.add(groups[1], step)
    drawn_CD, count = candidates.take(groups[0][0])
    assert count == 4, "the next step begins with none"
    assert drawn_CD[4].tolist() == [0.0, 0.0, 0.0]
    assert candidates.take(groups[0][0])[1] == 0
    assert drawn_CD.tolist() == _alone(groups[1], step).tolist(), "and counts micro-batches anew"


def _alone(rows_ND: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    candidates = CandidateRows(5)
    candidates.add(rows_ND, step)
    return candidates.take(rows_ND[0])[0]


def test_priorities_are_random_and_follow_from_where_a_row_is() -> None:
    # The first number of SplitMix64 with seed 0, as published with it.
    assert int(_mix(torch.tensor(0))) % 2**64 == 0xE220A8397B1DCDAF
    first, *others = (
        _priorities(torch.tensor(step), group, 4000) for step, group in ((3, 1), (3, 1), (3, 2), (4, 1))
    )
    assert first.tolist() == others[0].tolist()
    assert first.unique().numel() == 4000
    for other in others[1:]:
        assert abs(torch.corrcoef(torch.stack([first, other]).double())[0, 1]) < 0.1
        assert (first == other).sum() == 0
    assert abs((first > 0).double().mean() - 0.5) < 0.05
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]).double())[0, 1]) < 0.1
