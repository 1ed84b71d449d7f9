"""How much of the device's arithmetic a run uses."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What the vendor says of one device."""

    tflops: float
    """Peak dense bf16 TFLOP/s with fp32 accumulation."""
    memory_gib: int
    """Of its largest kind. The driver keeps 1 to 2% of it, 8% where plain memory corrects its errors."""

    @property
    def flops(self) -> float:
        """Peak FLOP/s."""
        return self.tflops * 1e12


GPUS = {
    "GB300": Gpu(2500.0, 288),
    "B300": Gpu(2250.0, 288),
    "GB200": Gpu(2500.0, 186),
    "B200": Gpu(2250.0, 180),
    "GH200": Gpu(989.0, 96),
    "H200 NVL": Gpu(836.0, 141),
    "H200": Gpu(989.0, 141),
    "H100 PCIe": Gpu(756.0, 80),
    "H100 NVL": Gpu(836.0, 94),
    "H100": Gpu(989.0, 80),
    "H800": Gpu(989.0, 80),
    "H20": Gpu(148.0, 96),
    "A100": Gpu(312.0, 80),
    "A800": Gpu(312.0, 80),
    "A40": Gpu(150.0, 48),
    "A30": Gpu(165.0, 24),
    "A10G": Gpu(70.0, 24),
    "A10": Gpu(125.0, 24),
    "L40S": Gpu(362.0, 48),
    "L40": Gpu(181.0, 48),
    "L4": Gpu(121.0, 24),
    "RTX 4090": Gpu(165.0, 24),
    "RTX 3090": Gpu(71.0, 24),
    "MI355X": Gpu(2500.0, 288),
    "MI325X": Gpu(1307.0, 256),
    "MI300X": Gpu(1307.0, 192),
    "MI300A": Gpu(981.0, 128),
    "MI250X": Gpu(191.5, 64),
}
"""From the vendors' data sheets, whose GB of device memory are GiB.

The first entry whose name stands as whole words in the device's name counts. An MI250X shows itself as two
devices, so it counts half here.
"""


def find_gpu(name: str) -> Gpu | None:
    """The entry that a device's name (`NVIDIA H200`, `h200`) stands for; None for others and every CPU."""
    for known, gpu in GPUS.items():
        if re.search(rf"\b{known}\b", name, re.IGNORECASE):
            return gpu
    return None


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its name, or None where it is not known (every CPU)."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.flops


def device_name(device: torch.device) -> str:
    """What the device calls itself: `NVIDIA H200`, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def model_flops_utilisation(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share of the devices' peak that the model's own operations used, in [0, 1] (PaLM, appendix B).

    Args:
        flops: operations of forward and backward over all devices; recomputed ones do not count.
        seconds: wall time they took.
        peak: FLOP/s of one device; None gives None.
    """
    return None if peak is None else flops / (seconds * devices * peak)
