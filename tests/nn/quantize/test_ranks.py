"""Ranks with a share of the rows each against one process with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.dist import all_reduce_sum
from tests.distributed.spawn import run_ranks
from tests.nn.quantize.small import KINDS, close, gradients, rows, small

pytestmark = pytest.mark.distributed

SHARES = (5, 9)
"""Rows of each rank: not the same number."""


def learn(kind: str, z_ND: Tensor, weight_ND: Tensor) -> dict[str, Any]:
    made, found = gradients(small(kind), z_ND, weight_ND)
    return {
        "loss": made.loss_sum.detach(),
        "parts": dict(made.parts),
        "usage": made.usage_K,
        "indices": made.indices_N,
        "gradients": found,
        "statistics": dict(made.statistics),
    }


def inputs() -> tuple[Tensor, Tensor]:
    return rows(sum(SHARES), seed=1), rows(sum(SHARES), seed=2).detach()


def follow(micro_batches: list[list[Tensor]]) -> list[dict[str, Tensor]]:
    """The state of a moving average after each step; most codes die at once, and some rows are few."""
    quantizer: Any = small("ema", num_codes=12, reset_below=0.9)
    states = []
    for step in micro_batches:
        made = [quantizer(z_ND) for z_ND in step]
        quantizer.update(
            {
                name: all_reduce_sum(torch.stack([one.statistics[name] for one in made]).sum(0))
                for name in made[0].statistics
            }
        )
        states.append({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
    return states


def steps() -> list[list[Tensor]]:
    """Three steps of four micro-batches, the first with fewer rows than codes."""
    return [
        [rows(size, seed=10 * step + part).detach() for part in range(4)]
        for step, size in enumerate((2, 6, 6))
    ]


def on_a_rank() -> dict[str, Any]:
    import torch.distributed as dist

    rank = dist.get_rank()
    z_ND, weight_ND = (tensor.detach().split(SHARES)[rank] for tensor in inputs())
    found: dict[str, Any] = {kind: learn(kind, z_ND.clone().requires_grad_(), weight_ND) for kind in KINDS}
    found["follow"] = follow([step[rank::2] for step in steps()])
    if rank == 0:
        # Without gradients no rank waits for another: the last one never comes here.
        with torch.no_grad():
            found["alone"] = {kind: small(kind)(z_ND).loss_sum for kind in KINDS}
        found["eval"] = {kind: small(kind).eval()(z_ND).loss_sum.detach() for kind in KINDS}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_a_rank, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_add_up_to_the_whole(kind: str, ranks: list[dict[str, Any]]) -> None:
    whole = learn(kind, *inputs())
    found = [one[kind] for one in ranks]
    close(found[0]["loss"] + found[1]["loss"], whole["loss"])
    for name, part in whole["parts"].items():
        close(found[0]["parts"][name] + found[1]["parts"][name], part)
    assert torch.equal(torch.cat([one["indices"] for one in found]), whole["indices"])
    assert torch.equal(found[0]["usage"] + found[1]["usage"], whole["usage"])
    for name, statistic in whole["statistics"].items():
        close(found[0]["statistics"][name] + found[1]["statistics"][name], statistic)
    for name, gradient in whole["gradients"].items():
        of_ranks = [one["gradients"][name] for one in found]
        close(torch.cat(of_ranks) if name == "z" else of_ranks[0] + of_ranks[1], gradient)


def test_a_moving_average_follows_alike_on_any_number_of_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = follow(steps())
    resets = 0
    for step, wanted in enumerate(alone):
        assert all(
            torch.equal(ranks[0]["follow"][step][name], ranks[1]["follow"][step][name]) for name in wanted
        )
        for name, tensor in wanted.items():
            close(ranks[0]["follow"][step][name], tensor)
        seen = {tuple(row) for z_ND in steps()[step] for row in z_ND.tolist()}
        resets += sum(tuple(code) in seen for code in wanted["codebook_KD"].tolist())
    assert resets > 12, "the first step fills some codes and later ones replace others"


@pytest.mark.parametrize("mode", ["alone", "eval"])
def test_evaluation_needs_no_other_rank(mode: str, ranks: list[dict[str, Any]]) -> None:
    z_ND = inputs()[0].detach()[: SHARES[0]]
    for kind in KINDS:
        close(ranks[0][mode][kind], small(kind)(z_ND).loss_sum.detach())
