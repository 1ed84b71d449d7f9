"""How much of the device's arithmetic a run uses."""

from __future__ import annotations

import re

import torch

PEAK_BF16_TFLOPS = {
    "GB300": 2500.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 836.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 836.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "MI355X": 2500.0,
    "MI325X": 1307.0,
    "MI300X": 1307.0,
    "MI300A": 981.0,
    "MI250X": 191.5,
}
"""Peak dense bf16 TFLOP/s with fp32 accumulation of one device, from the vendors' data sheets.

The first entry whose name stands as whole words in the device's name counts. An MI250X shows itself as two
devices, so it counts half here.
"""


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its name, or None where it is not known (every CPU)."""
    for name, tflops in PEAK_BF16_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None


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
