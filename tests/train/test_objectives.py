"""Next-token loss: written out, split over micro-batches, told apart by modality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cantata.core.types import IMAGE, TEXT, StepTotals
from cantata.train.metrics import StepSums
from cantata.train.objectives import NextToken
from tests.nn.moe.small import balance
from tests.train.standin import EXPERTS, Sample, StandIn, pack

SAMPLES: list[Sample] = [(TEXT, [3, 1, 4]), (IMAGE, [1, 5, 9, 2]), (TEXT, [6, 5])]
TOTALS = StepTotals(tokens=9, target_tokens=6, target_weight=6)
NEXT_TOKEN = NextToken(balance(EXPERTS, z=1.0))


def step(*micro_batches: list[Sample], padding: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and sums of a step made of these micro-batches."""
    model, sums, value = StandIn(), StepSums(), torch.tensor(0.0)
    for samples in micro_batches:
        loss = NEXT_TOKEN(model, pack(samples, padding), TOTALS)
        loss.value.backward()
        value += loss.value.detach()
        sums.add(loss.sums)
    assert model.weight.grad is not None
    return value, model.weight.grad, sums.reduced()


def test_the_loss_is_the_sum_of_both_means() -> None:
    value, gradient, sums = step(SAMPLES, padding=3)
    cross_entropy = (1 + 4 + 5 + 9 + 2 + 5) / 6
    router = (1 + 2) * (3 + 1 + 4 + 1 + 5 + 9 + 2 + 6 + 5) / 9
    assert gradient.item() == pytest.approx(cross_entropy + router)
    assert value.item() == pytest.approx(1.5 * (cross_entropy + router))
    assert sums["loss_sum"].item() == pytest.approx(1.5 * 26)
    assert sums["squared_lengths"].item() == 3 * 3 + 4 * 4 + 2 * 2


@pytest.mark.parametrize(
    "split",
    [
        [SAMPLES[:1], SAMPLES[1:]],
        [SAMPLES[1:2], SAMPLES[2:], SAMPLES[:1]],
        [[], SAMPLES],
    ],
)
def test_shares_of_micro_batches_add_up_to_the_one_batch(split: list[list[Sample]]) -> None:
    value, gradient, sums = step(SAMPLES)
    shares, shared_gradient, shared_sums = step(*split, padding=2)
    torch.testing.assert_close(shares, value)
    torch.testing.assert_close(shared_gradient, gradient)
    assert sums.keys() == shared_sums.keys()
    for name, whole in sums.items():
        torch.testing.assert_close(shared_sums[name], whole, rtol=1e-6, atol=0, msg=name)


def test_targets_count_for_the_modality_of_their_sample() -> None:
    _, _, sums = step(SAMPLES)
    assert sums["targets_M"].tolist() == [3, 3, 0]
    assert sums["loss_sum_M"].tolist() == [1.5 * (1 + 4 + 5), 1.5 * (5 + 9 + 2), 0]
    assert sums["tokens_per_expert_LME"].sum(-1).tolist() == [[5, 4, 0]] * 2


def test_a_model_without_experts_has_cross_entropy_alone() -> None:
    loss = NextToken(None)(StandIn(with_router=False), pack(SAMPLES), TOTALS)
    assert loss.value.item() == pytest.approx(1.5 * 26 / 6)
    assert not any("router" in name or "expert" in name for name in loss.sums)
    assert not any(value.requires_grad for value in loss.sums.values())
