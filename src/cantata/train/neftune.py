"""NEFTune: noise on token embeddings while a model is fine-tuned (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import Batch
from cantata.models.protocol import EmbedsTokens


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let `model` train with noise; evaluation and generation stay as they are.

    Each value of a token's embedding gets uniform noise of up to alpha / sqrt(L * D), L the tokens of the
    sample that it stands in and D the width. It is drawn from the device's default generator, whose state
    checkpoints hold. Image features replace their placeholders' embeddings, noise and all, so they get none.

    An alpha of 0 is none. Raises `ConfigError` where the model does not say what its token embedding is.
    """
    if alpha == 0:
        return
    if not isinstance(model, EmbedsTokens):
        raise ConfigError(f"train.neftune_alpha: {type(model).__name__} does not name its token embedding")
    noise = _Noise(alpha)
    model.register_forward_pre_hook(noise.remember, with_kwargs=True)
    model.token_embedding.register_forward_hook(noise.add)


class _Noise:
    """What two hooks share: the batch that the embedding's hook is not given."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._batch: Batch | None = None

    def remember(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._batch = (keywords.get("batch") or arguments[0]) if model.training else None

    def add(self, embedding: nn.Module, arguments: tuple[Any, ...], x_TD: Tensor) -> Tensor:
        batch, self._batch = self._batch, None
        if batch is None:
            return x_TD
        bound_T = torch.zeros(x_TD.shape[0], device=x_TD.device)
        lengths = torch.tensor(batch.samples.lengths, dtype=torch.float32, device=x_TD.device)
        per_sample = self._alpha / math.sqrt(x_TD.shape[1]) * lengths.rsqrt()
        bound_T[: batch.num_tokens] = per_sample[batch.samples.ids(x_TD.device)]
        noise_TD = torch.empty(x_TD.shape, device=x_TD.device).uniform_(-1.0, 1.0) * bound_T[:, None]
        return x_TD + noise_TD.to(x_TD.dtype)
