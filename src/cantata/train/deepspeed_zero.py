"""Where each ZeRO stage keeps its fp32 masters and gradients.

DeepSpeed has four optimizers behind one engine. This file gives them one face: fragments of the
masters for the checkpoint, the gradient's norm before the update, clearing, and writing the masters
back into the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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

    replicated = False
    """Every rank owns every parameter whole."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.fragments = self.find_fragments()

    def find_fragments(self) -> dict[str, Fragment]:
        """This rank's fragment of each trained parameter that it owns a part of."""
        raise NotImplementedError

    def flats(self) -> list[Tensor]:
        """Every fp32 tensor that this rank's optimizer updates."""
        raise NotImplementedError

    def reduce(self) -> None:
        """Sum gradients over ranks after a step's last backward, where backward did not."""

    def norm(self) -> float:
        """L2 norm of the summed gradients over all parameters and ranks; inf where it is not finite."""
        raise NotImplementedError

    def clip(self, norm: float, max_norm: float | None) -> None:
        """Scale gradients by `max_norm / norm` if that is below 1; DeepSpeed does so inside its step."""
        self.optimizer.clip_grad = max_norm or 0.0

    def step(self) -> None:
        self.engine.step()

    def clear(self) -> None:
        """Forget gradients, the accumulated ones too."""
        self.optimizer.zero_grad()

    def refresh(self) -> None:
        """Copy the masters into the model's weights."""
        self.optimizer.update_lp_params()

    def read_frozen(self, name: str) -> Tensor:
        return self.frozen[name].detach()

    def write_frozen(self, name: str, value: Tensor) -> None:
        self.frozen[name].data.copy_(value.view_as(self.frozen[name]))


class Replicated(Stage):
    """Stage 0. DeepSpeed would sum bf16 gradients in bf16 here, so the masters are ours."""

    replicated = True

    def __init__(
        self, engine: Any, parameters: Mapping[str, nn.Parameter], masters: Mapping[nn.Parameter, Tensor]
    ) -> None:
        self.masters = masters
        super().__init__(engine, parameters)
        engine.enable_backward_allreduce = False
        for parameter in self.trained.values():
            if masters[parameter] is not parameter:
                parameter.register_post_accumulate_grad_hook(self._move_gradient)  # type: ignore[no-untyped-call]

    def find_fragments(self) -> dict[str, Fragment]:
        return {
            name: Fragment(self.masters[parameter], 0, 0, parameter.numel())
            for name, parameter in self.trained.items()
        }

    def flats(self) -> list[Tensor]:
        return [self.masters[parameter] for parameter in self.trained.values()]

    def reduce(self) -> None:
        for master in self.flats():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self.engine.buffered_allreduce_fallback(grads=self._gradients(), elements_per_buffer=BUCKET)

    def norm(self) -> float:
        return float(total_norm(self._gradients()))

    def clip(self, norm: float, max_norm: float | None) -> None:
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.flats(), max_norm, torch.tensor(norm))

    def step(self) -> None:
        self.engine.step()
        self.refresh()
        self.clear()

    def clear(self) -> None:
        for tensor in (*self.flats(), *self.trained.values()):
            tensor.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter in self.trained.values():
            if self.masters[parameter] is not parameter:
                parameter.copy_(self.masters[parameter])

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.flats() if master.grad is not None]

    def _move_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        master = self.masters[parameter]
        if parameter.grad is None:
            return
        gradient = parameter.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None


class PartitionedStates(Stage):
    """Stages 1 and 2."""

    def find_fragments(self) -> dict[str, Fragment]:
        fragments = {}
        for name, parameter in self.trained.items():
            link: Any = getattr(parameter, "_hp_mapping", None)
            if link is not None:
                ours, theirs = link.hp_fragment_address, link.lp_fragment_address
                flat = self.flats()[link.param_group_index]
                fragments[name] = Fragment(flat, ours.start, theirs.start, ours.numel)
        return fragments

    def flats(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def norm(self) -> float:
        return float(self.optimizer.scaled_global_norm())

    def clear(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        # DeepSpeed counts micro-batches up from -1; its step would have started the count anew.
        optimizer.micro_step_id = -1


class PartitionedStatesBF16(PartitionedStates):
    """Stage 1 in bf16 without offload, which DeepSpeed gives an optimizer of its own."""

    def flats(self) -> list[Tensor]:
        return list(self.optimizer.fp32_groups_flat_partition)

    def norm(self) -> float:
        gradients, _ = self.optimizer.get_grads_for_norm()
        return float(total_norm(gradients))

    def clear(self) -> None:
        self.optimizer.zero_grad()


class PartitionedWeights(Stage):
    """Stage 3."""

    def find_fragments(self) -> dict[str, Fragment]:
        fragments = {}
        for name, parameter in self.trained.items():
            shape: Any = parameter
            group, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            parameter_start = shape.ds_zero_partition_rank * size
            # The last partition is padded to the size of the others.
            numel = min(size, shape.ds_numel - parameter_start)
            if numel > 0:
                fragments[name] = Fragment(self.flats()[group], start, parameter_start, numel)
        return fragments

    def flats(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def norm(self) -> float:
        norms = [float(norm) for norm in self.optimizer._get_norm_groups()]
        # DeepSpeed writes -1 for a group whose norm is not finite.
        return float("inf") if min(norms) < 0 else sum(norm**2 for norm in norms) ** 0.5

    def clear(self) -> None:
        self.optimizer._pre_step()
        self.optimizer._overflow_clean_up(self.optimizer.loss_scale)

    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def read_frozen(self, name: str) -> Tensor:
        with self._gathered(name):
            return self.frozen[name].detach().clone()

    def write_frozen(self, name: str, value: Tensor) -> None:
        with self._gathered(name, modifier_rank=0):
            self.frozen[name].data.copy_(value.view_as(self.frozen[name]))

    def _gathered(self, name: str, modifier_rank: int | None = None) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([self.frozen[name]], modifier_rank=modifier_rank)
