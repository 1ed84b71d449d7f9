"""The FSDP2 engine: parameters, gradients and optimizer state sharded over a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cantata.core.errors import ConfigError, RunError
from cantata.core.types import MicroBatch, StepTotals
from cantata.models.lora import base_names
from cantata.parallel.fsdp import Sharding, sharded_modules
from cantata.parallel.materialize import Source, materialize, persistent_tensors
from cantata.parallel.mesh import RankMesh
from cantata.parallel.pack import base_note, pack_base
from cantata.parallel.plan import apply_plan, fp32_parameters
from cantata.parallel.recompute import Recompute
from cantata.train.ema import adam_state, swapped
from cantata.train.engine import Objective
from cantata.train.norm import clip, total_norm
from cantata.train.optim import (
    OptimizerPartial,
    ParameterRule,
    describe_groups,
    optimizer_defaults,
    parameter_groups,
)
from cantata.train.options import Offload, Precision, StateDtype, choice

_DTYPES = {
    Precision.bf16: torch.bfloat16,
    Precision.fp32: torch.float32,
    StateDtype.bf16: torch.bfloat16,
    StateDtype.fp32: torch.float32,
}


class FSDP2Engine:
    """Shards a model from the meta device, fills it and trains it.

    Gradients are reduce-scattered after every micro-batch and accumulate in their shards: keeping
    whole gradients until the last micro-batch would save traffic, at the price of one unsharded
    model in memory, which sharding exists to avoid. Only the copies of a hybrid mesh wait for the
    last micro-batch before they sum among themselves.

    Args:
        model: on the meta device, following `models.protocol.LanguageModel`.
        mesh: from `parallel.mesh.build_mesh`.
        source: where initial values come from: `RandomInit` or a published checkpoint.
        optimizer: an optimizer of the Adam family, missing only its parameter groups.
        parameters: rates, decay and freezing by name pattern.
        device: of this rank.
        precision: what forward and backward compute in.
        state_dtype: what shards, accumulated gradients and optimizer state are kept in; what adapters leave
            as it came is kept in `precision`.
        offload: `none` or `parameters`.

    Raises:
        ConfigError: an unsupported option or combination, or parameter rules that do not fit the model.
    """

    model: nn.Module

    def __init__(
        self,
        *,
        model: nn.Module,
        mesh: RankMesh,
        source: Source,
        optimizer: OptimizerPartial,
        parameters: Mapping[str, ParameterRule],
        recompute: Recompute,
        compile: bool,
        device: torch.device,
        precision: Precision | str,
        state_dtype: StateDtype | str,
        offload: Offload | str,
    ) -> None:
        precision = choice(Precision, precision, "engine.precision")
        state_dtype = choice(StateDtype, state_dtype, "engine.state_dtype")
        offload = choice(Offload, offload, "engine.offload")
        if offload is Offload.optimizer:
            raise ConfigError(
                "engine.offload=optimizer is not offered by fsdp2; use engine.offload=parameters or "
                "engine=deepspeed"
            )
        if precision is Precision.fp32 and state_dtype is StateDtype.bf16:
            raise ConfigError(
                "engine.state_dtype=bf16 needs engine.precision=bf16: fp32 computed from bf16 parameters "
                "is not fp32"
            )
        defaults = optimizer_defaults(optimizer)
        # On meta first, so that a misspelt pattern is found before anything is allocated.
        groups = parameter_groups(model, parameters, *defaults)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.summary = describe_groups(groups, model)
        base, exact = base_names(model), fp32_parameters(model)
        for name, parameter in model.named_parameters():
            # What never changes and is never saved needs no more bits than it computes with.
            kept_in = precision if name in base else state_dtype
            parameter.data = parameter.data.to(torch.float32 if name in exact else _DTYPES[kept_in])
        pack_base(model, _DTYPES[precision], mesh, compile=compile)
        offloaded = offload is Offload.parameters
        sharding = Sharding(_DTYPES[precision], offloaded)
        apply_plan(model, recompute=recompute, compile=compile, mesh=mesh, sharding=sharding)
        materialize(model, source, device, torch.device("cpu") if offloaded else None)

        self.model = model
        self.settings = (
            f"fsdp2, {precision.value}, states {state_dtype.value}, offload {offload.value}{base_note(model)}"
        )
        # While a unit is gathered its module holds other tensors, so the shards are remembered here.
        self._shards = dict(model.named_parameters())
        self._trained = {name: shard for name, shard in self._shards.items() if shard.requires_grad}
        for group in groups:
            group["params"] = [self._shards[names[parameter]] for parameter in group["params"]]
        self._optimizer = optimizer(groups)
        _start_adam(self._optimizer)

    def forward_backward(
        self, batch: MicroBatch, objective: Objective, totals: StepTotals, *, last: bool
    ) -> dict[str, Tensor]:
        """See `Engine`."""
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_requires_all_reduce(last)
        loss = objective(self.model, batch, totals)
        loss.value.backward()  # type: ignore[no-untyped-call]
        return loss.sums

    def gradient_norm(self, max_norm: float | None) -> float:
        """See `Engine`."""
        gradients = [shard.grad for shard in self._trained.values() if shard.grad is not None]
        norm = total_norm(gradients)
        if max_norm is not None:
            clip(self._trained.values(), max_norm, norm)
        return norm.item()

    def step(self, learning_rate_factor: float) -> None:
        """See `Engine`."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor
        self._optimizer.step()
        self._optimizer.zero_grad()

    def skip(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`; the tensors are the engine's own, so loading into them in place is enough."""
        state: dict[str, Any] = {
            f"model.{name}": self._shards.get(name, tensor).detach()
            for name, tensor in persistent_tensors(self.model)
        }
        for name, shard in self._trained.items():
            for key, value in self._optimizer.state[shard].items():
                state[f"optimizer.{name}.{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`.

        Raises:
            RunError: names differ from those of `state_dict`.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            different = sorted(own.keys() ^ state.keys())
            raise RunError(f"state of another model: {len(different)} names differ, first {different[0]}")
        self._forget_gathered()
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine`."""
        try:
            with swapped(self._optimizer, self._trained.values()):
                self._forget_gathered()
                yield
        finally:
            self._forget_gathered()

    def _forget_gathered(self) -> None:
        """Drop what an evaluation left gathered: it would go on with the old values."""
        for module in sharded_modules(self.model):
            module.reshard()


def _start_adam(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the first step would make, so that checkpoints always hold and find all of it.

    Raises:
        ConfigError: the optimizer is not of the Adam family, whose state starts from zeros.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise ConfigError(f"optimizer={type(optimizer).__name__}: fsdp2 supports torch.optim.AdamW and Adam")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = adam_state(optimizer, group, parameter)
