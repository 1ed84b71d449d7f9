"""Where each ZeRO stage keeps its fp32 masters and gradients; see `deepspeed_stage`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata.train.deepspeed_experts import SpreadExperts
from cantata.train.deepspeed_stage import BUCKET, Fragment, Stage
from cantata.train.norm import total_norm


class Replicated(Stage):
    """Stage 0. DeepSpeed would sum bf16 gradients in bf16 here, so the masters are ours."""

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        experts: SpreadExperts,
        masters: Mapping[nn.Parameter, Tensor],
    ) -> None:
        self.masters = masters
        super().__init__(engine, parameters, experts)
        engine.enable_backward_allreduce = False
        for parameter in self.trained.values():
            if masters[parameter] is not parameter:
                parameter.register_post_accumulate_grad_hook(self._move_gradient)  # type: ignore[no-untyped-call]

    def find_copied(self) -> set[str]:
        return {*self.trained, *self.frozen}

    def find_fragments(self) -> dict[str, Fragment]:
        return {name: self.whole_fragment(name, self.masters[p]) for name, p in self.trained.items()}

    def flats(self) -> list[Tensor]:
        return [self.masters[parameter] for parameter in self.trained.values()]

    def gradients(self) -> list[Tensor]:
        dense, spread = self._split_gradients()
        return dense + spread

    def reduce(self) -> None:
        for master in self.flats():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        dense, spread = self._split_gradients()
        self.engine.buffered_allreduce_fallback(grads=dense, elements_per_buffer=BUCKET)
        if spread:
            self.engine.allreduce_no_retain(spread, self.experts.holders, numel_per_bucket=BUCKET)

    def norm(self) -> float:
        dense, spread = (total_norm(gradients).square() for gradients in self._split_gradients())
        if self.experts.names:
            spread = spread.to(self.flats()[0].device)
            dist.all_reduce(spread, group=self.experts.owners)
        return float((dense + spread).sqrt())

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

    def _split_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those that all ranks share, and those of experts that are spread."""
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, parameter in self.trained.items():
            gradient = self.masters[parameter].grad
            if gradient is not None:
                parts[name in self.experts.names].append(gradient)
        return parts

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
                start = self.experts.start(name, parameter) + theirs.start
                fragments[name] = Fragment(flat, ours.start, start, ours.numel)
        return fragments

    def flats(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def gradients(self) -> list[Tensor]:
        if self.optimizer.cpu_offload:
            return [flat.grad for flat in self.flats() if flat.grad is not None]
        return [part for parts in self.optimizer.averaged_gradients.values() for part in parts]

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

    def gradients(self) -> list[Tensor]:
        return list(self.optimizer.fp32_groups_gradient_flat_partition)

    def clear(self) -> None:
        self.optimizer.zero_grad()


class PartitionedWeights(Stage):
    """Stage 3."""

    def find_copied(self) -> set[str]:
        return set()

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

    def clip(self, norm: float, max_norm: float | None) -> None:
        # DeepSpeed clips inside its step, by the same norm: here it is right.
        self.optimizer.clip_grad = max_norm or 0.0

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

    def read_partitioned(self, name: str) -> Tensor:
        with self._gathered(name):
            return self.frozen[name].detach().clone()

    def write_partitioned(self, name: str, value: Tensor) -> None:
        with self._gathered(name, modifier_rank=0):
            self.frozen[name].data.copy_(value.view_as(self.frozen[name]))

    def _gathered(self, name: str, modifier_rank: int | None = None) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([self.frozen[name]], modifier_rank=modifier_rank)
