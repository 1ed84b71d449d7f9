"""Experts with adapters of their own, whose updates (E, D, 2F) and (E, F, D) are never made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cantata.nn.lora.settings import LoRASettings
from cantata.nn.moe.dispatch import Dispatched
from cantata.nn.moe.experts import Experts, run_experts
from cantata.nn.moe.low_rank import Flat

_ALIGNED_BYTES = 16
"""What the grouped kernel wants strides to be a multiple of."""


class LoRAExperts(Experts):
    """`Experts` whose fc1, fc2 or both are `W[e] + scaling A[e] B[e]`.

    `fc1_lora_A` (E, D, r), `fc1_lora_B` (E, r, 2F), `fc2_lora_A` (E, F, r), `fc2_lora_B` (E, r, D); those of
    a matrix without settings are absent. fc1's dropout is drawn by token, for all of its experts at once, and
    fc2's by row. Made by `adapt`.
    """

    settings: Mapping[str, LoRASettings]

    def add_factors(self, settings: Mapping[str, LoRASettings]) -> None:
        """Register the factors of the matrices ("fc1", "fc2") that have settings, without values."""
        self.settings = settings
        for name, given in settings.items():
            weight: Tensor = getattr(self, name)
            experts, inputs, outputs = weight.shape
            setattr(self, f"{name}_lora_A", nn.Parameter(weight.new_empty(experts, inputs, given.r)))
            setattr(self, f"{name}_lora_B", nn.Parameter(weight.new_empty(experts, given.r, outputs)))

    def forward(self, given: Dispatched) -> Tensor:
        """See `Experts`."""
        fc1, fc2 = self.local(self.fc1), self.local(self.fc2)
        rows = len(given.order.token_R)
        x_ND = given.x_ND
        low = *self._low("fc1", x_ND, x_ND.shape), *self._low("fc2", x_ND, (rows, fc2.shape[1]))
        return run_experts(given, fc1, fc2, low)

    def _low(self, name: str, like: Tensor, inputs: Sequence[int]) -> Flat:
        """A, B and which inputs count, in the dtype and for the device of `like`."""
        if name not in self.settings:
            return None, None, None
        settings = self.settings[name]
        a, b = (self.local(getattr(self, f"{name}_lora_{part}")).to(like.dtype) for part in "AB")
        kept = settings.draw_kept(inputs, like.device, self.training)
        b = b * settings.scale(kept)
        return *((a, b) if like.device.type == "cpu" else aligned(a, b)), kept


def aligned(a_EIr: Tensor, b_ErO: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors whose rank the grouped kernel takes, padded with zeros where need be."""
    lacking = -a_EIr.shape[2] % (_ALIGNED_BYTES // a_EIr.element_size())
    return (F.pad(a_EIr, (0, lacking)), F.pad(b_ErO, (0, 0, 0, lacking))) if lacking else (a_EIr, b_ErO)
