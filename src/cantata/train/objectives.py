"""What is minimised, one small class per stage."""

from __future__ import annotations

import torch
from torch import nn

from cantata.core.types import MODALITIES, Batch, ModelOutput, StepTotals
from cantata.nn.moe.router import count
from cantata.train.engine import Loss


class NextToken:
    """Cross entropy per target token, plus the router's balance terms per token.

    The step's loss is `sum(cross entropy) / target tokens + sum(router loss * tokens) / tokens`,
    each sum over all ranks and micro-batches. Cross entropy and z-loss do not depend on how a step is split;
    the Switch balance loss does, because each micro-batch is balanced over its own tokens.
    """

    def __call__(self, model: nn.Module, batch: Batch, totals: StepTotals) -> Loss:
        output: ModelOutput = model(batch)
        value = output.loss_sum / totals.target_tokens
        targets_M = count(batch.target_modality_N, len(MODALITIES))
        sums = {
            "loss_sum": output.loss_sum.detach(),
            "loss_sum_M": torch.zeros(len(MODALITIES), device=output.loss_N.device).index_add(
                0, batch.target_modality_N, output.loss_N
            ),
            "targets_M": targets_M,
            "squared_lengths": output.loss_N.new_full(
                (), float(sum(n * n for n in batch.samples.lengths)), dtype=torch.float64
            ),
        }
        if output.router is not None:
            share = batch.num_tokens / totals.tokens
            value = value + output.router.loss.sum() * share
            sums["router/aux_loss_L"] = output.router.aux_loss * share
            sums["router/z_loss_L"] = output.router.z_loss * share
            sums["tokens_per_expert_LME"] = output.router.tokens_per_expert_ME
        return Loss(value, sums)
