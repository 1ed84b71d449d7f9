"""How long a run takes, from its operations and a stated share of the devices' peak."""

from __future__ import annotations

from typing import NamedTuple

from cantata.train.stage import Stage


class Hours(NamedTuple):
    """Of the whole run, without start, evaluations and checkpoints."""

    step_seconds: float
    hours: float
    """Wall time of `train.max_steps`."""
    gpu_hours: float
    """That of all devices together."""
    tokens_per_second_per_gpu: float


def hours(stage: Stage, flops_per_step: float, tokens_per_step: int) -> Hours | None:
    """At `cluster.mfu` of the peak of `cluster.gpu`; None where no peak is known.

    As everywhere, the peak is that of bf16, and operations that recomputation repeats count as none: they
    lower the share (PaLM, appendix B).

    Args:
        flops_per_step: forward and backward, of all ranks.
        tokens_per_step: of all ranks; codes of an image tokenizer.
    """
    cluster = stage.cluster
    if cluster.device is None:
        return None
    seconds = flops_per_step / (cluster.gpus * cluster.device.flops * cluster.mfu)
    total = seconds * stage.train.max_steps / 3600
    return Hours(seconds, total, total * cluster.gpus, tokens_per_step / seconds / cluster.gpus)
