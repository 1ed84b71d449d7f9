"""LPIPS with random weights against its definition in plain modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.nn.perceptual import lpips
from cantata.nn.perceptual.lpips import LPIPS

PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
NARROW = 16


@pytest.fixture
def vgg(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """VGG16's features as torchvision builds them, a sixteenth as wide."""
    monkeypatch.setattr(lpips, "WIDTHS", tuple(width // NARROW for width in lpips.WIDTHS))
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for entry in PLAN:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, entry // NARROW, 3, padding=1), nn.ReLU()]
            before = entry // NARROW
    return nn.Sequential(*layers)


def linear_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for index, width in enumerate(lpips.WIDTHS)
    }


def write(folder: Path, vgg: nn.Sequential) -> tuple[Path, Path]:
    vgg_file, linear_file = folder / "vgg16.pth", folder / "lpips.safetensors"
    of_vgg = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    torch.save(of_vgg | {"classifier.0.weight": torch.zeros(1)}, vgg_file)
    save_file(linear_weights(), linear_file)
    return vgg_file, linear_file


def test_equals_its_definition(vgg: nn.Sequential, tmp_path: Path) -> None:
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    y = (x + 0.2 * torch.randn(x.shape)).requires_grad_()
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    wanted = torch.zeros(2)
    a, b = (x - shift) / scale, (y - shift) / scale
    linear = list(linear_weights().values())
    for index, layer in enumerate(vgg):
        a, b = layer(a), layer(b)
        # After relu1_2, 2_2, 3_3, 4_3 and 5_3.
        if index in (3, 8, 15, 22, 29):
            level = (3, 8, 15, 22, 29).index(index)
            unit_a, unit_b = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
            wanted = wanted + nn.functional.conv2d((unit_a - unit_b) ** 2, linear[level]).mean((1, 2, 3))
    network = LPIPS(*write(tmp_path, vgg))
    found = network.distance(x, y)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value.sum(), y)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(network.features(x), vgg[:30]((x - shift) / scale).mean((2, 3)))
    assert (network.distance(x, x) == 0).all()


def test_missing_tensors_are_listed(vgg: nn.Sequential, tmp_path: Path) -> None:
    vgg_file, linear_file = write(tmp_path, vgg)
    with pytest.raises(
        ConfigError, match=r"vgg16\.pth lack 5 tensors: lin0\.model\.1\.weight \[1, 4, 1, 1\]"
    ):
        LPIPS(vgg_file, vgg_file)
    with pytest.raises(ConfigError, match=r"lpips\.safetensors lack 26 tensors"):
        LPIPS(linear_file, linear_file)
