"""torch-fidelity's Inception with random weights; torchvision, which it imports, is stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.nn.perceptual.inception import Inception

FUNCTIONAL = "torchvision.transforms.functional"


class Anything(ModuleType):
    """A module that has whatever is imported from it."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(sys.prefix) / "apart")
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", FUNCTIONAL):
        module = Anything(name)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    yield pytest.importorskip("torch_fidelity")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


@pytest.mark.slow
def test_features_are_the_librarys_with_weights_of_ones_own(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, file = library.FeatureExtractorInceptionV3, tmp_path / "inception.pth"
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        torch.save({}, file)
        torch.manual_seed(0)
        network = kind("x", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(network.state_dict(), file)
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    features_BF = Inception(file).to(torch.device("cpu")).features(images.double())
    assert features_BF.shape == (2, 2048)
    assert torch.equal(features_BF, network(images.byte())[0])
    assert not torch.equal(features_BF[0], features_BF[1])


def test_other_tensors_are_refused(library: Any, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other\.pth is no weights of Inception: .*Missing key"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="is no file"):
        Inception(tmp_path / "gone.pth")


def test_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "some.pth")
    with pytest.raises(ConfigError, match="pip install torch-fidelity, or set inception=null"):
        Inception(tmp_path / "some.pth")
