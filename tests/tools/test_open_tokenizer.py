"""A tokenizer from a run, a checkpoint or an exported folder: the same codes, the same digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata import cli
from cantata.core.build import build
from cantata.core.config import compose, resolved, save_config
from cantata.core.errors import ConfigError
from cantata.models.autoencoder import Autoencoder
from cantata.nn.quantize import FiniteScalarQuantizer, VectorQuantizer
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors
from cantata.tools.open_tokenizer import OpenedTokenizer, digest, open_tokenizer
from cantata.train.checkpoint import CheckpointConfig, Checkpointer, fingerprint
from tests.models.autoencoder.small import SHAPE, filled, pixels
from tests.recipes.runner import SMALL_EMA, TINY_VQ
from tests.tools.test_export import make_run

CPU = torch.device("cpu")


class AveragingEngine:
    """As much of an engine as a checkpoint sees: a model, and averages that are other values."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value.detach() for name, value in persistent_tensors(self.model)}
        averages = {name: value.detach() for name, value in self.model.named_parameters()}
        return state | {f"optimizer.{name}.ema": value * 1.25 for name, value in averages.items()}


def make_tokenizer(run: Path, *overrides: str, seed: int = 3, tiny: tuple[str, ...] = TINY_VQ) -> nn.Module:
    """A run directory of the tiny tokenizer with a checkpoint; returns the model that its averages make."""
    config = resolved(compose("vq", [*tiny, f"out={run}", *overrides]).node)
    with torch.device("meta"):
        model: nn.Module = build(config["model"])
    materialize(model, RandomInit(model, seed), CPU)
    save_config(config, run / "config.yaml")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = CheckpointConfig(every=1, keep=3, background=False, resume="auto", best=None)
    checkpoints = Checkpointer(run, settings, fingerprint(model))
    engine: Any = AveragingEngine(model)
    checkpoints.save(1, engine, {}, {})
    checkpoints.close()
    dist.destroy_process_group()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside it what it was exported to."""
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizer(folder / "run", *SMALL_EMA)
    assert cli.main(["export", str(folder / "run"), "--to", str(folder / "hub")]) == 0
    return folder / "run"


def codes_of(opened: OpenedTokenizer) -> Tensor:
    return opened.model.encode(pixels(3, 1, 3, 16, 32))


@pytest.mark.parametrize(
    "quantizer", ["ema", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vq", "residual", "fsq"))]
)
def test_a_run_is_read_with_its_averages_and_exported_so(tmp_path: Path, quantizer: str) -> None:
    own = make_tokenizer(tmp_path / "run", f"quantizer@model.quantizer={quantizer}")
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "hub")]) == 0
    wanted = own.encode(pixels(3, 1, 3, 16, 32))  # type: ignore[operator]
    places = [tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "hub"]
    for opened in (open_tokenizer(place, CPU) for place in places):
        assert torch.equal(codes_of(opened), wanted)
        assert opened.digest == digest(own)
        images = [model.decode(wanted) for model in (opened.model, own)]  # type: ignore[operator]
        assert torch.equal(*images)
    assert not opened.model.training
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())


def test_other_weights_have_another_digest(run: Path, tmp_path: Path) -> None:
    opened = open_tokenizer(run, CPU)
    make_tokenizer(tmp_path / "other", *SMALL_EMA, seed=4)
    assert open_tokenizer(tmp_path / "other", CPU).digest != opened.digest
    codebook = opened.model.quantizer.codebook_KD
    assert isinstance(codebook, Tensor)
    codebook[3, 1] += 1e-6
    assert digest(opened.model) != opened.digest


def test_the_same_tensors_with_another_rule_have_another_digest() -> None:
    plain, unit = (
        Autoencoder(SHAPE, VectorQuantizer(32, 4, 0.25, l2_normalize=l2, gradient="straight_through"))
        for l2 in (False, True)
    )
    filled(plain)
    unit.load_state_dict(plain.state_dict())
    assert digest(plain) != digest(unit)


@pytest.mark.slow
def test_emu3s_tokenizer_is_read_from_a_run_and_as_published(tmp_path: Path) -> None:
    shape = ("quantizer@model.quantizer=emu3", "model.quantizer.num_codes=64")
    small = ("model.shape.channel_multipliers=[1,1]", "model.shape.attention_levels=[]")
    config = ("model=emu3_vqvae_mini", *shape, *small)
    own = make_tokenizer(tmp_path / "run", *config, tiny=())
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "hub")]) == 0
    wanted = own.encode(pixels(3, 1, 3, 16, 32))  # type: ignore[operator]
    for place in ("run", "hub"):
        opened = open_tokenizer(tmp_path / place, CPU)
        assert torch.equal(codes_of(opened), wanted)
        assert opened.digest == digest(own)


def test_what_is_no_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; give a run of cantata vq"):
        open_tokenizer(tmp_path / "none", CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a complete checkpoint nor a run directory"):
        open_tokenizer(tmp_path / "empty", CPU)
    make_run(tmp_path / "aria")
    with pytest.raises(ConfigError, match="Aria is no image tokenizer; give a run of cantata vq"):
        open_tokenizer(tmp_path / "aria", CPU)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type='llama'; image tokenizers are cantata_autoencoder"):
        open_tokenizer(hub, CPU)


def test_a_folder_may_not_name_other_code(run: Path, tmp_path: Path) -> None:
    config = json.loads((run.parent / "hub" / "config.json").read_text())
    config["quantizer"]["_target_"] = "cantata.models.aria.Aria"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"only cantata\.nn\.quantize"):
        open_tokenizer(tmp_path, CPU)


def test_levels_are_a_part_of_the_digest() -> None:
    one, other = (Autoencoder(SHAPE, FiniteScalarQuantizer(levels)) for levels in ([8, 5], [5, 8]))
    other.load_state_dict(one.state_dict())
    assert digest(one) != digest(other)
    again = Autoencoder(SHAPE, FiniteScalarQuantizer([8, 5]))
    again.load_state_dict(one.state_dict())
    assert digest(one) == digest(again)
