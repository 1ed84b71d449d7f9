"""`cantata verify`: its verdict, its table and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.models.aimv2 import vision
from cantata.models.hub import save_to_hub
from cantata.tools import verify
from tests.models.aimv2.small import NATIVE, VISION, contrastive, encoder
from tests.models.aria.small import small_aria, small_layout
from tests.models.emu3.small import small_config, small_emu3
from tests.models.mllama import small as mllama

LAYOUT = small_layout()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_to_hub(small_aria(LAYOUT), LAYOUT, tmp_path / "hub", 10**9)
    return tmp_path / "hub"


def test_a_good_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert verify.main([str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "logits" in out
    assert "equal to transformers" in out
    assert "FAILED" not in out


def test_a_difference_fails(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    original = verify.run_native

    def wrong(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, logits = original(*arguments)
        return loss, logits + 0.01

    monkeypatch.setattr(verify, "run_native", wrong)
    assert verify.main([str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "1 of " in out


def test_a_bad_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        verify.main([str(tmp_path)])
    assert ConfigError.exit_code == 2


def test_without_transformers_it_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match="transformers, which is not installed"):
        verify.main([str(checkpoint)])


def test_a_good_emu3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its dropout is off, or nothing would be equal."""
    pytest.importorskip("transformers")
    model = small_emu3(small_config(dropout=0.5))
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    assert verify.main([str(tmp_path / "hub")]) == 0
    assert "21 gradients compared; equal to transformers" in capsys.readouterr().out


@pytest.mark.parametrize(("vision", "gradients"), [("small", 135), (None, 0)])
def test_a_good_mllama(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vision: str | None, gradients: int
) -> None:
    """Compared with transformers' masking; of text alone, what reads images is frozen on either side."""
    pytest.importorskip("transformers")
    layout = mllama.small_layout(vision)
    model = mllama.small_mllama(layout)
    gradients = gradients or sum(parameter.requires_grad for parameter in model.parameters())
    save_to_hub(model, layout, tmp_path / "hub", 10**9)
    assert verify.main([str(tmp_path / "hub")]) == 0
    assert f"{gradients} gradients compared; equal to transformers" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["fixed", "native", "pairs"])
def test_a_good_aimv2(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    model = contrastive() if kind == "pairs" else encoder(NATIVE if kind == "native" else VISION)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    assert verify.main([str(tmp_path / "hub")]) == 0
    out = capsys.readouterr().out
    assert ("similarities" if kind == "pairs" else "features") in out
    count = len(list(model.named_parameters()))
    assert f"{count} gradients compared; equal to transformers" in out


def test_a_bad_aimv2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    model = encoder(NATIVE)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    original = vision.sincos_positions
    monkeypatch.setattr(vision, "sincos_positions", lambda *given: original(*given).roll(1, dims=1))
    assert verify.main([str(tmp_path / "hub")]) == 1
    assert "FAILED" in capsys.readouterr().out
