"""One face for DeepSpeed's four optimizers.

Fragments of the masters for the checkpoint, the gradients' norm before the update, clipping, clearing, and
writing the masters back into the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata.core.dist import all_reduce_sum
from cantata.train.deepspeed_experts import SpreadExperts
from cantata.train.norm import total_norm

BUCKET = 50_000_000
"""Elements that travel in one collective: enough to hide its latency, and 200 MB in fp32."""


class Fragment(NamedTuple):
    """The part of a parameter whose fp32 master this rank owns."""

    flat: Tensor
    """The tensor that the optimizer updates, and the key of its state."""
    start: int
    """First element inside `flat`."""
    parameter_start: int
    """First element inside the flattened parameter."""
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment of a tensor laid out as `flat`: of `flat` itself or of one of its states."""
        return tensor.view(-1).narrow(0, self.start, self.numel)

    def within(self, value: Tensor) -> Tensor:
        """This fragment of the whole parameter's value."""
        return value.view(-1).narrow(0, self.parameter_start, self.numel)

    def rows(self, shape: Sequence[int]) -> tuple[slice, slice]:
        """The rows of a parameter of this shape that hold the fragment, and where in those rows it lies."""
        width = math.prod(shape[1:])
        first, last = self.parameter_start // width, -(-(self.parameter_start + self.numel) // width)
        start = self.parameter_start - first * width
        return slice(first, last), slice(start, start + self.numel)


class Stage:
    """One ZeRO stage; the base is what all share."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter], experts: SpreadExperts) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.experts = experts
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.copied = self.find_copied()
        self.fragments = self.find_fragments() | {
            name: self.whole_fragment(name, p) for name, p in self.frozen.items() if name in self.copied
        }

    def find_copied(self) -> set[str]:
        """Parameters that no rank gave a part of away: whole, or all of the experts that it holds."""
        return set(self.frozen)

    def find_fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of each trained parameter that it owns a part of."""
        raise NotImplementedError

    def whole_fragment(self, name: str, flat: Tensor) -> Fragment:
        """All of a parameter that is here."""
        return Fragment(flat, 0, self.experts.start(name, flat), flat.numel())

    def is_split(self, name: str) -> bool:
        """Whether a parameter is whole on no rank."""
        return name not in self.copied or name in self.experts.names

    def is_giver(self, name: str, owner: int) -> bool:
        """Whether this rank's fragment belongs into the whole that `owner` puts together.

        Fragments of copied experts are held several times; the owner and its neighbours have each once.
        """
        return name not in self.copied or self.experts.are_neighbours(dist.get_rank(), owner)

    def flats(self) -> list[Tensor]:
        """Every fp32 tensor that this rank's optimizer updates."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """What this rank's optimizer will use, summed over ranks."""
        raise NotImplementedError

    def reduce(self) -> None:
        """Sum gradients over ranks after a step's last backward, where backward did not."""

    def norm(self) -> float:
        """L2 norm of the summed gradients over all parameters and ranks; not finite where one is not.

        Ranks own disjoint parts, of experts too, so that their squares add up.
        """
        return math.sqrt(all_reduce_sum([float(total_norm(self.gradients())) ** 2])[0])

    def clip(self, norm: float, max_norm: float | None) -> None:
        """Scale gradients by `max_norm / norm` if that is below 1.

        DeepSpeed's own clipping stays off: it takes a norm in fp32, and that of experts as a mean.
        """
        if max_norm is not None and (scale := max_norm / (norm + 1e-6)) < 1:
            torch._foreach_mul_(self.gradients(), scale)

    def step(self) -> None:
        self.engine.step()

    def clear(self) -> None:
        """Forget gradients, the accumulated ones too."""
        self.optimizer.zero_grad()

    def refresh(self) -> None:
        """Copy the masters into the model's weights."""
        self.optimizer.update_lp_params()

    def read_partitioned(self, name: str) -> Tensor:
        """A frozen parameter that is not copied, whole on every rank; a collective."""
        raise NotImplementedError

    def write_partitioned(self, name: str, value: Tensor) -> None:
        """Give such a parameter its whole value, the same on every rank; a collective."""
        raise NotImplementedError
