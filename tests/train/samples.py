"""A start-up report and lines of metrics as runs make them."""

from pathlib import Path

from cantata.train.memory import MemoryEstimate
from cantata.train.startup import Experts, GroupRow, SourceRow, StartupReport


def report(out: Path, **changes: object) -> StartupReport:
    values = {
        "stage": "pretrain",
        "name": "aria_mini",
        "out": out,
        "origin": "resumed from step-00000100",
        "engine": "fsdp2, bf16, states fp32, offload none",
        "mesh": {"dp_replicate": 1, "dp_shard": 2, "ep": 1},
        "world_size": 2,
        "device": "cpu",
        "versions": "torch 2.13.0",
        "groups": [
            GroupRow("default", 7_340_032, 3e-4, 0.1),
            GroupRow("default (no decay)", 12_288, 3e-4, 0.0),
            GroupRow("projector.*", 310_000, 1e-3, 0.1),
            GroupRow("frozen", 812_544, None, None),
        ],
        "experts": Experts(5, 16, 4, 8_474_864, 3_100_000),
        "sources": [SourceRow("emoji", 1_716, 0.7), SourceRow("shakespeare", None, 0.3)],
        "held_out": [SourceRow("emoji (held out)", 190, None)],
        "max_steps": 3_000,
        "micro_batch_size": 4,
        "sequence_length": 512,
        "gradient_accumulation_steps": 2,
        "memory": MemoryEstimate(34 << 20, 34 << 20, 68 << 20, 9 << 20, 312 << 20),
        "traffic": None,
        "flops_per_step": 1.52e11,
        "notes": ["TensorBoard: tensorboard --logdir outputs/aria_mini/tensorboard"],
    }
    return StartupReport(**(values | changes))  # type: ignore[arg-type]


def record(step: int, **changes: float | None) -> dict[str, float | int | None]:
    values: dict[str, float | int | None] = {
        "step": step,
        "loss": 6.0 - step / 10,
        "grad_norm": 0.812,
        "learning_rate": 3e-4,
        "tokens": step * 8000,
        "target_tokens": step * 6000,
        "tokens_per_second_per_device": 1934.2,
        "step_seconds": 4.0,
        "data_seconds": 0.08,
        "memory_gib": 1.2,
        "mfu": None,
        "loss/text": 6.0,
    }
    return values | changes
