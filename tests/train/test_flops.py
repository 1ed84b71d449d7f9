import pytest
import torch

from cantata.train.flops import GPUS, device_name, find_gpu, model_flops_utilisation, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307),
        ("h100", 989),
    ],
)
def test_devices_are_told_apart(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


def test_every_gpu_is_found_by_its_own_name() -> None:
    """No entry stands behind one that takes its name."""
    for name, gpu in GPUS.items():
        assert find_gpu(name.lower()) is gpu


def test_an_unknown_device_has_no_peak_and_no_utilisation() -> None:
    assert peak_flops(device_name(torch.device("cpu"))) is None
    assert peak_flops("NVIDIA A1000") is None
    assert model_flops_utilisation(1e15, 1.0, 1, None) is None


def test_utilisation_counts_every_device() -> None:
    assert model_flops_utilisation(flops=8e14, seconds=2.0, devices=4, peak=1e14) == 1.0
