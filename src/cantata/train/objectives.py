"""What is minimised, one small class per stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cantata.core.dist import all_reduce_sum
from cantata.core.errors import ConfigError
from cantata.core.types import MODALITIES, Batch, ModelOutput, RouterStats, StepTotals
from cantata.models.protocol import LanguageModel, PairEncoder
from cantata.nn.moe.balance import BalanceConfig, balance_loss
from cantata.nn.moe.router import count
from cantata.train.engine import Loss


class NextToken:
    """Cross entropy per target token, plus the router's balance terms per token.

    The step's loss is `sum(weight * cross entropy) / sum(weight) + sum(balance terms) / tokens`, each sum
    over all ranks and micro-batches; a target weighs 1 unless its message says otherwise. A micro-batch is
    balanced over its tokens on every rank, so its loss does not depend on how many ranks share it.

    balance: how the model's routers are balanced; None where it has none.
    """

    def __init__(self, balance: BalanceConfig | None) -> None:
        self.balance = balance

    def __call__(self, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
        output: ModelOutput = model(batch)
        value = output.loss_sum / totals.target_weight
        sums = {"loss_sum": output.loss_sum.detach(), **token_sums(output.loss_N, batch)}
        if output.router is not None and self.balance is not None and torch.is_grad_enabled():
            loss_sum, router_sums = _balance(output.router, batch, self.balance)
            value = value + loss_sum / totals.tokens
            sums |= router_sums
        return Loss(value, sums)


class NextTokenOf(NextToken):
    """`NextToken` for a model whose routers say how they are balanced.

    Raises `ConfigError` for a model that predicts no tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, PairEncoder) or not isinstance(model, LanguageModel):
            raise ConfigError(f"objective=next_token: {type(model).__name__} predicts no tokens")
        super().__init__(model.balance)


def token_sums(loss_N: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the metrics need of the targets' losses, as sums over this rank's.

    Targets, their weight and their weighted loss, for each modality of the sample that they stand in, and the
    squares of the samples' lengths.
    """
    weight_N = torch.ones_like(loss_N) if batch.target_weight_N is None else batch.target_weight_N
    zeros_M = torch.zeros(len(MODALITIES), device=loss_N.device, dtype=torch.float64)
    modality_N = batch.target_modality_N
    return {
        "loss_sum_M": zeros_M.index_add(0, modality_N, (loss_N * weight_N).double()),
        "target_weight_M": zeros_M.index_add(0, modality_N, weight_N.double()),
        "targets_M": count(modality_N, len(MODALITIES)),
        "squared_lengths": zeros_M.new_tensor(float(sum(n * n for n in batch.samples.lengths))),
    }


def _balance(stats: RouterStats, batch: Batch, config: BalanceConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The balance terms, and what the metrics need of the routing: sums over this rank's tokens."""
    balance = balance_loss(stats, all_reduce_sum(stats.tokens_per_expert_ME), config)
    sums = {f"router/{name}": value for name, value in balance.sums.items()}
    sums["router/tokens_M"] = count(batch.modality_ids_T + 1, len(MODALITIES) + 1)[1:]
    sums["tokens_per_expert_LME"] = stats.tokens_per_expert_ME
    return balance.loss_sum, sums
