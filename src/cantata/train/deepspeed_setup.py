"""What DeepSpeed needs before it starts: a quiet import, its settings, and a model with storage."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cantata.core.errors import ConfigError
from cantata.models.protocol import Unit
from cantata.train.deepspeed_stage import BUCKET
from cantata.train.options import Offload, Precision


def import_deepspeed(device: torch.device) -> Any:
    """The library, saying no more than its warnings; raises `ConfigError` where it is not installed."""
    if device.type == "cpu":
        # Its own search would warn that it found no accelerator, or take one that this run does not use.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with quiet():
            library = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ConfigError("engine=deepspeed needs DeepSpeed: pip install cantata[deepspeed]") from error
    # DeepSpeed calls torch by names that torch is about to change; nothing a user could act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    # Its shared-memory operator serves inference only, and would be compiled now, with a C++ compiler.
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_keep)
    return library


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed to stdout: banners and notes on compiled operators."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def settings(zero_stage: int, precision: Precision, offload: Offload, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Gradients are reduced and accumulated in fp32 whatever the compute precision. Accumulation
    steps stay at 1 because the loop says itself which micro-batch is a step's last.
    """
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    place = {"device": "cpu", "pin_memory": device.type != "cpu"}
    if offload is not Offload.none:
        zero["offload_optimizer"] = place
    if offload is Offload.parameters:
        zero["offload_param"] = place
    if zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = BUCKET
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if zero_stage < 3:
        config["gradient_allreduce_op"] = "sum"
    if precision is Precision.bf16 and zero_stage > 0:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return config


def allocate(
    module: nn.Module, dtype: torch.dtype, device: torch.device, made: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Give every parameter and buffer on the meta device storage, its values still undefined.

    Floating parameters take `dtype`; buffers keep theirs. A parameter spread over ranks becomes a plain
    tensor of the part that is here, as DeepSpeed wants it. `made` maps old parameters to new ones over
    several calls, so that one shared by two modules stays shared.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                storage = torch.empty(here.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(storage, requires_grad=parameter.requires_grad)
            setattr(part, name, made[parameter])
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.empty_like(buffer, device=device))


def gather_whole_blocks(library: Any, units: Sequence[Unit]) -> None:
    """Let ZeRO-3 gather each block as one, around its call, so that nothing is gathered inside it.

    Hooks inside a recomputed block would run collectives in the middle of it, unlike those of its first
    run, and recomputation compares the two.
    """
    for unit in units:
        if unit.is_block:
            library.utils.set_z3_leaf_module(unit.module, True)
            unit.module.register_forward_pre_hook(_follow_input)


def _follow_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make a block's first input carry a gradient even where everything before it is frozen.

    ZeRO-3 collects a block's gradients when that of its input arrives; without one it would not wait
    for them, and reduce zeros.
    """
    x, *others = arguments
    if not torch.is_grad_enabled() or x.requires_grad:
        return None
    return x.detach().requires_grad_(), *others


def _keep(record: logging.LogRecord) -> bool:
    # Any optimizer that is not DeepSpeed's own earns this line; ours is tested against one process.
    return "untested optimizer" not in record.getMessage()
