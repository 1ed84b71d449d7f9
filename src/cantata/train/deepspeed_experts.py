"""Expert parallelism under ZeRO: what DeepSpeed must be told of experts that live on some ranks only.

DeepSpeed shares a parameter among all ranks, unless it carries `allreduce = False` and the name of a group:
then only the ranks that hold the same experts share it. Its engine looks for experts in layers of its own
classes; a subclass tells it of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from cantata.parallel.mesh import RankMesh
from cantata.train.optim import OptimizerPartial


@dataclass(frozen=True)
class SpreadExperts:
    """The parameters of which a rank holds its own experts alone, and the ranks that hold the others."""

    names: frozenset[str]
    mesh: RankMesh

    @staticmethod
    def of(model: nn.Module, mesh: RankMesh) -> SpreadExperts:
        """Those that `apply_plan` has spread; to be asked before the model gets storage."""
        spread = (name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor))
        return SpreadExperts(frozenset(spread), mesh)

    @property
    def holders(self) -> ProcessGroup:
        """The ranks that hold the same experts as this one."""
        assert self.mesh.experts is not None
        return self.mesh.experts["efsdp"].get_group()

    @property
    def owners(self) -> ProcessGroup:
        """The ranks that hold all experts together."""
        assert self.mesh.experts is not None
        return self.mesh.experts["ep"].get_group()

    @property
    def group_name(self) -> str:
        """What DeepSpeed calls the groups of this size."""
        return f"ep_size_{self.mesh.ep}"

    def start(self, name: str, local: Tensor) -> int:
        """Where the part of a parameter that is here begins in the flattened whole."""
        return dist.get_rank() % self.mesh.ep * local.numel() if name in self.names else 0

    def are_neighbours(self, rank: int, other: int) -> bool:
        """Whether two ranks belong to one set of `mesh.ep` ranks that hold all experts together."""
        return rank // self.mesh.ep == other // self.mesh.ep


def start(
    library: Any,
    model: nn.Module,
    optimizer: OptimizerPartial,
    groups: list[dict[str, Any]],
    config: dict[str, Any],
    experts: SpreadExperts,
) -> tuple[Any, torch.optim.Optimizer]:
    """DeepSpeed's engine and the optimizer inside it; like `deepspeed.initialize`, but with experts.

    Stage 0 needs not know of experts: it shares nothing, and gradients are summed by ours.
    """
    trained = {p for name, p in model.named_parameters() if name in experts.names and p.requires_grad}
    if not trained or config["zero_optimization"]["stage"] == 0:
        made = optimizer(groups)
        engine, *_ = library.initialize(model=model, optimizer=made, config=config)
        return engine, made
    for parameter in trained:
        marked: Any = parameter
        marked.allreduce, marked.group_name = False, experts.group_name
    made = optimizer(separate(groups, trained, experts.group_name))
    backend = library.accelerator.get_accelerator().communication_backend_name()
    library.init_distributed(dist_backend=backend)
    engine = _engine_class(library, experts.mesh.ep)(
        args=None,
        model=model,
        optimizer=made,
        config=config,
        config_class=library.DeepSpeedConfig(config, None),
    )
    return engine, made


def separate(
    groups: list[dict[str, Any]], experts: set[nn.Parameter], group_name: str
) -> list[dict[str, Any]]:
    """The same optimizer groups with experts in groups of their own, named and flagged for DeepSpeed."""
    dense = [group | {"params": [p for p in group["params"] if p not in experts]} for group in groups]
    spread = [
        group | {"params": [p for p in group["params"] if p in experts], "moe": True, "name": group_name}
        for group in groups
    ]
    return [group for group in (*dense, *spread) if group["params"]]


def _engine_class(library: Any, ep: int) -> Any:
    class Engine(library.DeepSpeedEngine):  # type: ignore[misc]
        """Knows that there are experts, though no layer is of DeepSpeed's classes."""

        def _configure_distributed_model(self, model: nn.Module) -> None:
            self.has_moe_layers = True
            # The layout is that of `RankMesh`: neighbours hold different experts.
            library.utils.groups._create_expert_and_data_parallel(ep)
            super()._configure_distributed_model(model)

    return Engine
