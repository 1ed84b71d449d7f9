"""The two ends of a language model with adapters: embedding and output head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cantata.nn.head import LanguageHead
from cantata.nn.lora.settings import LoRASettings
from cantata.nn.matmul import linear
from cantata.nn.moe.low_rank import kept_only


class LoRAEmbedding(nn.Embedding):
    """`W[x] + scaling A^T[x] B^T`, without dropout: `lora_A` (r, V), `lora_B` (D, r). Made by `adapt`."""

    settings: LoRASettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def add_factors(self, settings: LoRASettings) -> None:
        """Register the factors, without values."""
        self.settings = settings
        self.lora_A = nn.Parameter(self.weight.new_empty(settings.r, self.num_embeddings))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.embedding_dim, settings.r))

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        low = F.embedding(input, self.lora_A.t()).to(y.dtype)
        return y + linear(low, self.lora_B.to(y.dtype) * self.settings.scaling)


class LoRAHead(LanguageHead):
    """`LanguageHead` whose matrix (its own or the embedding's) is `W + scaling B A`.

    `lora_A` (r, D), `lora_B` (V, r). Made by `adapt`.
    """

    settings: LoRASettings
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def add_factors(self, settings: LoRASettings) -> None:
        """Register the factors, without values."""
        self.settings = settings
        like = self.norm.weight if self.weight is None else self.weight
        self.lora_A = nn.Parameter(like.new_empty(settings.r, len(self.norm.weight)))
        self.lora_B = nn.Parameter(like.new_empty(self.vocab_size, settings.r))

    def low_rank(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LanguageHead`; dropout is drawn anew at each call."""
        kept = self.settings.draw_kept(x_TD.shape, x_TD.device, self.training)
        a, b = self.lora_A.to(x_TD.dtype), self.lora_B.to(x_TD.dtype)
        return linear(kept_only(x_TD, kept), a * self.settings.scale(kept)), b
