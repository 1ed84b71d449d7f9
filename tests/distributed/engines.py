"""Engines over all ranks of a test, and what they save."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cantata.parallel.materialize import RandomInit
from cantata.parallel.mesh import MeshConfig
from cantata.parallel.recompute import Recompute
from cantata.train.deepspeed import DeepSpeedEngine
from cantata.train.engine import Engine
from cantata.train.fsdp2 import FSDP2Engine
from tests.distributed.mesh import mesh_of

CPU = torch.device("cpu")


def build_engine(name: str, model: nn.Module, seed: int, optimizer: Any, **options: Any) -> Engine:
    """`fsdp2` or `zero N` for a model on meta: in fp32, over all ranks, unless `options` say otherwise."""
    settings: dict[str, Any] = {
        "mesh": mesh_of(MeshConfig(dp_replicate=1, dp_shard=-1, ep=1)),
        "parameters": {},
        "recompute": Recompute.none,
        "compile": False,
        "device": CPU,
        "precision": "fp32",
        "offload": "none",
    }
    settings |= {"model": model, "source": RandomInit(model, seed), "optimizer": optimizer} | options
    if name == "fsdp2":
        return FSDP2Engine(**settings, state_dtype="fp32")
    return DeepSpeedEngine(**settings, zero_stage=int(name.removeprefix("zero ")))


def saved(engine: Engine) -> dict[str, Tensor]:
    """What this rank saves, each tensor whole; of a ZeRO engine every rank holds a part of the names."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in engine.state_dict().items()
    }
