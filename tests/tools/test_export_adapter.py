"""`cantata export` of LoRA runs and of adapters: the adapter, the merged model, and what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata import cli
from cantata.core.build import build
from cantata.core.config import compose, resolved, save_config
from cantata.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterReader, whole
from cantata.models.hub import HubReader, HubWriter, parameter_shapes
from cantata.models.lora import LoRAConfig, apply_lora, base_names
from cantata.models.merge import MergedWeights
from cantata.nn.lora import Packing, is_factor
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors
from cantata.tools.runs import BASE
from cantata.train.adapter import BaseIdentity
from cantata.train.checkpoint import CheckpointConfig, Checkpointer, fingerprint
from cantata.train.stage import base_values
from tests.models.adapters import lora
from tests.recipes.runner import TINY

CONFIG = lora(
    targets=["text.layers.*", "head"],
    ranks={"*.experts.*": 2},
    modules_to_save=["*.router.weight"],
    dropout=0.05,
)


class AdapterEngine:
    """As much of an engine as a checkpoint sees: what an adapted model keeps beside its base."""

    def __init__(self, model: nn.Module) -> None:
        kept = base_names(model)
        tensors = [(name, value) for name, value in persistent_tensors(model) if name not in kept]
        self.tensors = {f"model.{name}": value.detach() for name, value in tensors}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.tensors)


def tiny(*overrides: str) -> tuple[dict[str, Any], Any]:
    config = resolved(compose("pretrain", [*TINY, *overrides]).node)
    with torch.device("meta"):
        return config, build(config["model"])


def make_base(folder: Path) -> None:
    """A published tiny Aria in bf16."""
    _, model = tiny()
    source = RandomInit(model, seed=5)
    with HubWriter(folder, model.hub_layout(), 10**9) as writer:
        for name, parameter in model.named_parameters():
            writer.write(name, source.read(name, whole(parameter.shape)).bfloat16())
    (folder / "tokenizer.json").write_text("the base's")
    (folder / "chat_template.jinja").write_text("the base's")


def make_run(run: Path, weights: Path | None, settings: LoRAConfig = CONFIG) -> Any:
    """A LoRA run with one checkpoint, and its adapted model with factors that are not zero."""
    given = "null" if weights is None else str(weights)
    config, model = tiny(f"out={run}", f"model.weights={given}")
    config["lora"] = vars(settings) | {"quantize_base": settings.quantize_base.value}
    save_config(config, run / "config.yaml")
    apply_lora(model, settings)
    torch.manual_seed(0)
    source = base_values(config["model"]["weights"], config["seed"], model)
    shapes = parameter_shapes(model)
    materialize(model, _Filled(shapes, source), torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kept = CheckpointConfig(every=1, keep=3, background=False, resume="auto", best=None)
    checkpoints = Checkpointer(run, kept, fingerprint(model))
    engine: Any = AdapterEngine(model)
    identity = BaseIdentity(config["model"]["weights"], config["seed"], settings)
    checkpoints.save(3, engine, {}, {BASE: identity.state_dict()})
    checkpoints.close()
    dist.destroy_process_group()
    return model


class _Filled:
    """The base's values, and random ones for factors."""

    def __init__(self, shapes: dict[str, torch.Size], base: Any) -> None:
        self._shapes, self._base = shapes, base

    def __iter__(self) -> Any:
        return iter(self._shapes)

    def read(self, name: str, index: Any) -> Tensor:
        if is_factor(name):
            return 0.1 * torch.randn(self._shapes[name])
        value: Tensor = self._base.read(name, index)
        return value + 0.5 if "router" in name else value


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hub"
    make_base(folder)
    return folder


@pytest.fixture(scope="module")
def run_and_model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, make_run(run, base)


@pytest.fixture
def run(run_and_model: tuple[Path, Any]) -> Path:
    return run_and_model[0]


@pytest.fixture
def model(run_and_model: tuple[Path, Any]) -> Any:
    return run_and_model[1]


def command(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line of a command that must end with 2."""
    assert command(*arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def assert_merged(
    folder: Path, base: Any, model: Any, dtype: torch.dtype, settings: LoRAConfig = CONFIG
) -> None:
    _, plain = tiny()
    found = HubReader(folder, plain.hub_layout(), parameter_shapes(plain))
    layout = plain.hub_layout()
    merged = MergedWeights(model, layout, settings, base, lambda n: model.get_parameter(n).detach(), dtype)
    for name in merged:
        assert torch.equal(found.read(name), merged.read(name)), name
    assert found.read("head.weight").dtype == dtype


def test_the_adapter(
    run: Path, base: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "--to", tmp_path / "adapter") == 0
    shown = capsys.readouterr().out
    assert "an adapter of" in shown
    assert "step-00000003 (step 3)" in shown
    assert "lora_dropout is written as 0" in shown
    layout = model.hub_layout()
    reader = AdapterReader(tmp_path / "adapter", layout, model, CONFIG, base_values(str(base), 0, model))
    for name in reader:
        value = model.get_parameter(name)
        assert torch.equal(reader.read(name, whole(value.shape)), value), name
    written = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert written["base_model_name_or_path"] == str(base)
    assert (tmp_path / "adapter" / "chat_template.jinja").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(("flags", "dtype"), [((), torch.bfloat16), (("--dtype", "fp32"), torch.float32)])
def test_the_merged_model(
    run: Path, base: Path, model: Any, tmp_path: Path, flags: tuple[str, ...], dtype: torch.dtype
) -> None:
    assert command(run, "--merge", "--to", tmp_path / "hub", *flags) == 0
    assert_merged(tmp_path / "hub", base_values(str(base), 0, model), model, dtype)
    present = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= present


def test_what_learned_over_a_packed_base_is_merged_into_the_whole_one(base: Path, tmp_path: Path) -> None:
    settings = replace(CONFIG, quantize_base=Packing.nf4)
    model = make_run(tmp_path / "run", base, settings)
    assert command(tmp_path / "run", "--merge", "--to", tmp_path / "hub") == 0
    assert_merged(tmp_path / "hub", base_values(str(base), 0, model), model, torch.bfloat16, settings)
    assert command(tmp_path / "run", "--to", tmp_path / "adapter") == 0


def test_an_adapter_folder_merged_into_a_base(
    run: Path, base: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    assert command(run, "--to", adapter) == 0
    (adapter / "tokenizer.json").unlink()
    assert "add --merge --base HF_DIR" in refused(capsys, adapter, "--to", tmp_path / "hub")
    assert command(adapter, "--merge", "--base", base, "--to", tmp_path / "hub") == 0
    assert f"{adapter} merged into {base}" in capsys.readouterr().out
    assert_merged(tmp_path / "hub", base_values(str(base), 0, model), model, torch.bfloat16)
    assert (tmp_path / "hub" / "tokenizer.json").read_text() == "the base's"
    assert (tmp_path / "hub" / "chat_template.jinja").read_text() != "the base's"
    assert not (tmp_path / "hub" / ADAPTER_WEIGHTS).exists()


def test_random_values_as_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = lora(targets=["text.layers.*.self_attn.*"], dora=True)
    model = make_run(run, None, settings)
    seed = resolved(compose("pretrain", [*TINY]).node)["seed"]
    assert command(run, "--merge", "--to", tmp_path / "hub") == 0
    assert_merged(tmp_path / "hub", base_values(None, seed, model), model, torch.float32, settings)
    assert command(run, "--to", tmp_path / "adapter") == 0
    assert "no folder holds what it adapts" in capsys.readouterr().out
    written = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert written["base_model_name_or_path"] is None


def test_the_base_must_be_trainings(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ((), ("--merge",)):
        moved = tmp_path / "moved"
        line = refused(capsys, run, *flags, "--base", moved, "--to", tmp_path / "hub")
        assert str(moved) in line
    make_base(moved)
    assert command(run, "--base", moved, "--to", tmp_path / "adapter") == 0
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    line = refused(capsys, run, "--merge", "--base", moved, "--to", tmp_path / "hub")
    assert "adapts other weights" in line
    assert not (tmp_path / "hub").exists()


def test_what_peft_has_no_place_for_can_be_merged(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = lora(targets=["projector.cross_attn.*"])
    make_run(tmp_path / "run", base, settings)
    assert "add" not in refused(capsys, tmp_path / "run", "--to", tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert command(tmp_path / "run", "--merge", "--to", tmp_path / "hub") == 0


def test_memory_of_a_merge_does_not_grow_with_the_model(
    run: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the shard under way is held (a slow look, so now and then), and of what was merged nothing."""
    read, seen, held = MergedWeights.read, list[weakref.ref[Tensor]](), list[int]()
    outside = {id(value) for value in gc.get_objects() if type(value) is Tensor}

    def watched(self: MergedWeights, name: str) -> Tensor:
        assert not any(ref() is not None for ref in seen), f"more than one whole tensor at {name}"
        if len(seen) % 8 == 0:
            inside = [v for v in gc.get_objects() if type(v) is Tensor and id(v) not in outside]
            held.append(sum(value.untyped_storage().nbytes() for value in inside))
        tensor = read(self, name)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(MergedWeights, "read", watched)
    assert command(run, "--merge", "--to", tmp_path / "hub", "--max-shard-size", "0.1MB") == 0
    sizes = [p.numel() * 2 for name, p in model.named_parameters() if not is_factor(name)]
    assert len(seen) == len(sizes)
    assert max(held) <= max(100_000, *sizes) < sum(sizes) / 2
