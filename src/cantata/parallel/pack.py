"""Let the frozen base of adapters rest in fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from cantata.core.errors import ConfigError
from cantata.models.lora import packed_names, packing
from cantata.nn.lora import PackedWeight, Packing, require_library
from cantata.nn.moe.experts import Experts
from cantata.parallel.expert import check_ranks
from cantata.parallel.mesh import RankMesh


def base_note(model: nn.Module) -> str:
    """What an engine's description says of a packed base, if there is one."""
    kind = packing(model)
    return "" if kind is Packing.none else f", base {kind.value}"


def pack_base(model: nn.Module, dtype: torch.dtype, mesh: RankMesh, *, compile: bool) -> None:
    """Put packed buffers in the places of the parameters that `lora.quantize_base` names, in place.

    They are no parameters any more, so nothing shards them: every rank holds all of them, but of experts that
    `mesh.ep` spreads its own only. They keep their names and whole shapes, and are filled as any buffer is,
    from the source's whole tensors, one at a time.

    Args:
        model: on the meta device, before `apply_plan`.
        dtype: what they are unpacked to.

    Raises:
        ConfigError: bitsandbytes is missing, or the blocks are to be compiled.
    """
    names = packed_names(model)
    if not names:
        return
    require_library()
    kind = packing(model)
    if compile:
        raise ConfigError(
            f"train.compile=true is not offered with lora.quantize_base={kind.value}: compiled blocks would "
            "keep their weights unpacked for backward; set train.compile=false or lora.quantize_base=none"
        )
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        shape = model.get_parameter(name).shape
        delattr(module, leaf)
        spread = mesh.experts["ep"] if mesh.experts is not None and isinstance(module, Experts) else None
        weight = _packed(shape, dtype, kind, spread)
        module.register_buffer(leaf, weight, persistent=False)


def _packed(shape: torch.Size, dtype: torch.dtype, kind: Packing, spread: DeviceMesh | None) -> Tensor:
    meta = torch.device("meta")
    if spread is None:
        return PackedWeight.empty(shape, dtype, kind, meta)
    check_ranks(shape[0], spread.size())
    mine = PackedWeight.empty((shape[0] // spread.size(), *shape[1:]), dtype, kind, meta)
    return DTensor.from_local(mine, spread, [Shard(0)], run_check=False)
