"""The DeepSpeed engine: ZeRO stages 0 to 3 under the same loop, optimizer and checkpoints as FSDP2.

| stage | shared among the ranks                    |
|-------|-------------------------------------------|
| 0     | nothing: gradients are summed             |
| 1     | fp32 masters and optimizer states         |
| 2     | ... and gradients                         |
| 3     | ... and weights, gathered as they are used |

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.core.types import MicroBatch, StepTotals
from cantata.models.protocol import Unit
from cantata.parallel.materialize import InitialValues, Source
from cantata.parallel.mesh import RankMesh
from cantata.parallel.pack import base_note, pack_base
from cantata.parallel.plan import Divisible, apply_plan, fp32_parameters
from cantata.parallel.recompute import Recompute
from cantata.train.deepspeed_experts import SpreadExperts, start
from cantata.train.deepspeed_setup import allocate, gather_whole_blocks, import_deepspeed, quiet, settings
from cantata.train.deepspeed_stage import Stage
from cantata.train.deepspeed_state import WholeState
from cantata.train.deepspeed_zero import (
    PartitionedStates,
    PartitionedStatesBF16,
    PartitionedWeights,
    Replicated,
)
from cantata.train.ema import swapped
from cantata.train.engine import Objective
from cantata.train.optim import (
    OptimizerPartial,
    ParameterRule,
    describe_groups,
    optimizer_defaults,
    parameter_groups,
)
from cantata.train.options import Offload, Precision, choice

_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


class DeepSpeedEngine:
    """Builds a model from the meta device under ZeRO, fills it and trains it.

    Gradients are summed over ranks and micro-batches in fp32. In bf16 the optimizer updates fp32
    masters, which are what checkpoints hold; initial values go into the masters unrounded, so a run
    starts where FSDP2 starts.

    Args:
        model: on the meta device, following `models.protocol.LanguageModel`.
        mesh: from `parallel.mesh.build_mesh`. With `mesh.ep` above 1 (stages 0 to 2) what a stage shares of
            experts it shares among the ranks that hold the same ones.
        source: where initial values come from: `RandomInit` or a published checkpoint.
        optimizer: an optimizer of the Adam family, missing only its parameter groups.
        parameters: rates, decay and freezing by name pattern.
        device: of this rank.
        precision: what forward and backward compute in.
        offload: `none`, `optimizer` (stages 1 to 3) or `parameters` (stage 3; the optimizer goes along).
        zero_stage: 0 to 3.

    Raises:
        ConfigError: DeepSpeed is not installed, an unsupported option or combination, or parameter
            rules that do not fit the model.
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
        offload: Offload | str,
        zero_stage: int,
    ) -> None:
        precision = choice(Precision, precision, "engine.precision")
        offload = choice(Offload, offload, "engine.offload")
        validate(mesh, offload, zero_stage, compile)
        if not isinstance(model, Divisible):
            raise TypeError(f"{type(model).__name__} lacks units; see cantata.models.protocol")
        units = model.units()
        if precision is Precision.bf16 and (exact := sorted(fp32_parameters(model))):
            raise ConfigError(
                f"engine.precision=bf16 is not offered by deepspeed for {exact[0]}, which must stay fp32 "
                "while it computes: it would be rounded; set engine.precision=fp32 or engine=fsdp2"
            )
        library = import_deepspeed(device)
        groups = parameter_groups(model, parameters, *optimizer_defaults(optimizer))
        self.model = model
        self.summary = describe_groups(groups, model)
        self.settings = (
            f"deepspeed, ZeRO {zero_stage}, {precision.value}, offload {offload.value}{base_note(model)}"
        )
        pack_base(model, _DTYPES[precision], mesh, compile=compile)
        names = {parameter: name for name, parameter in model.named_parameters()}
        shapes = {name: parameter.shape for parameter, name in names.items()}

        values = InitialValues(model, source)
        config = settings(zero_stage, precision, offload, device)
        apply_plan(model, recompute=recompute, compile=compile, mesh=mesh, sharding=None)
        experts = SpreadExperts.of(model, mesh)
        if zero_stage == 3:
            gather_whole_blocks(library, units)
        _build(library, model, units if zero_stage == 3 else [], config, _DTYPES[precision], device)
        named = dict(model.named_parameters())
        masters = _masters(model) if zero_stage == 0 else {}
        for group in groups:
            parts = [named[names[parameter]] for parameter in group["params"]]
            group["params"] = [masters.get(parameter, parameter) for parameter in parts]
        with quiet():
            self._engine, self._optimizer = start(library, model, optimizer, groups, config, experts)
        self._stage = _stage(self._engine, zero_stage, named, experts, masters)
        self._state = WholeState(self._stage, self._optimizer, model, shapes, device)
        self._state.fill(values)
        # Stage 3 can only average over ranks; the loss makes up for it, exactly where this is a power of two.
        self._loss_scale = float(mesh.size()) if zero_stage == 3 else 1.0

    def forward_backward(
        self, batch: MicroBatch, objective: Objective, totals: StepTotals, *, last: bool
    ) -> dict[str, Tensor]:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss = objective(self._engine, batch, totals)
        self._engine.backward(loss.value * self._loss_scale, scale_wrt_gas=False)
        if last:
            self._stage.reduce()
        return loss.sums

    def gradient_norm(self, max_norm: float | None) -> float:
        """Global L2 norm of the summed gradients; not finite where a gradient is not.

        Clipping to `max_norm` happens at once in stages 0 to 2, and inside `step` in stage 3.
        """
        norm = self._stage.norm()
        self._stage.clip(norm, max_norm)
        return norm

    def step(self, learning_rate_factor: float) -> None:
        """Update with each group's base rate times the factor, then clear gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor
        self._stage.step()

    def skip(self) -> None:
        """Clear gradients without an update."""
        self._stage.clear()

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors in host memory, each on one rank alone; a collective. See `deepspeed_state`."""
        return dict(self._state.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the tensors of `state_dict` back; a collective. Raises `RunError` where one is missing."""
        self._state.load_state_dict(state)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine`; a collective."""
        with swapped(self._optimizer, self._stage.flats()) as are_averages:
            if are_averages:
                self._stage.refresh()
            yield
        # Not after an error: peers may never come to this collective.
        if are_averages:
            self._stage.refresh()


def validate(mesh: RankMesh, offload: Offload, zero_stage: int, compile: bool) -> None:
    """Raise `ConfigError`, naming the option, for what the DeepSpeed engine cannot do."""
    if zero_stage not in range(4):
        raise ConfigError(f"engine.zero_stage={zero_stage} must be 0, 1, 2 or 3")
    if offload is Offload.parameters and zero_stage != 3:
        raise ConfigError(
            f"engine.offload=parameters needs engine.zero_stage=3 (it is {zero_stage}), where parameters are "
            "sharded; set engine.offload=optimizer or engine.zero_stage=3"
        )
    if offload is Offload.optimizer and zero_stage == 0:
        raise ConfigError(
            "engine.offload=optimizer needs engine.zero_stage=1, 2 or 3: stage 0 shards no optimizer state"
        )
    replicas = mesh.dense["dp_replicate"].size()
    if replicas != 1:
        raise ConfigError(
            f"mesh.dp_replicate={replicas} is not offered by deepspeed, which shards over "
            "every rank; set mesh.dp_replicate=1 or engine=fsdp2"
        )
    if mesh.ep != 1 and zero_stage == 3:
        raise ConfigError(
            f"mesh.ep={mesh.ep} is not offered with engine.zero_stage=3, which shards every weight over all "
            "ranks, whereas ranks hold different experts; set engine.zero_stage=2, mesh.ep=1 or engine=fsdp2"
        )
    if compile and zero_stage == 3:
        raise ConfigError(
            "train.compile=true is not offered with engine.zero_stage=3, whose hooks inside the blocks break "
            "every graph; set train.compile=false, engine.zero_stage=2 or engine=fsdp2"
        )


def _build(
    library: Any,
    model: nn.Module,
    partitioned: Sequence[Unit],
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give the model storage, at stage 3 one unit at a time, each partitioned before the next is made."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in [*(unit.module for unit in partitioned), model]:
        allocate(module, dtype, device, made)
        if partitioned:
            with quiet():
                library.zero.Init(module=module, config_dict_or_path=config)


def _masters(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The fp32 tensor behind each trained parameter: the parameter itself where it is fp32 already."""
    return {
        parameter: parameter
        if parameter.dtype == torch.float32
        else torch.zeros_like(parameter, dtype=torch.float32, requires_grad=True)
        for parameter in model.parameters()
        if parameter.requires_grad
    }


def _stage(
    engine: Any,
    zero_stage: int,
    parameters: Mapping[str, nn.Parameter],
    experts: SpreadExperts,
    masters: Mapping[nn.Parameter, Tensor],
) -> Stage:
    if zero_stage == 0:
        return Replicated(engine, parameters, experts, masters)
    if zero_stage == 3:
        return PartitionedWeights(engine, parameters, experts)
    if hasattr(engine.optimizer, "fp32_groups_flat_partition"):
        return PartitionedStatesBF16(engine, parameters, experts)
    return PartitionedStates(engine, parameters, experts)
