"""`cantata export`: what it writes, what it refuses, and how much memory it holds meanwhile."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cantata import cli
from cantata.core.build import build
from cantata.core.config import compose, resolved, save_config
from cantata.models.hub import HubReader, parameter_shapes
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors
from cantata.tools import export
from cantata.train.checkpoint import CheckpointConfig, Checkpointer, fingerprint
from cantata.train.checkpoint_tensors import StoredTensors
from tests.recipes.runner import TINY


class ModelEngine:
    """As much of an engine as a checkpoint sees: a model, and moments that no export may read."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value.detach() for name, value in persistent_tensors(self.model)}
        return state | {f"optimizer.{name}.exp_avg": value for name, value in self.model.named_parameters()}


def make_run(
    run: Path, *overrides: str, steps: tuple[int, ...] = (7,), tiny: Sequence[str] = TINY
) -> nn.Module:
    """A run directory with checkpoints of a tiny model; every step's weights are its number apart."""
    config = resolved(compose("pretrain", [*tiny, f"out={run}", *overrides]).node)
    with torch.device("meta"):
        model: nn.Module = build(config["model"])
    materialize(model, RandomInit(model, seed=3), torch.device("cpu"))
    save_config(config, run / "config.yaml")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = CheckpointConfig(every=1, keep=3, background=False, resume="auto", best=None)
    checkpoints = Checkpointer(run, settings, fingerprint(model))
    engine: Any = ModelEngine(model)
    for step in steps:
        with torch.no_grad():
            next(model.parameters()).fill_(step)
        checkpoints.save(step, engine, {}, {})
    checkpoints.close()
    dist.destroy_process_group()
    return model


@pytest.fixture(scope="module")
def run_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, make_run(run, steps=(7, 10))


@pytest.fixture
def run(run_and_model: tuple[Path, nn.Module]) -> Path:
    return run_and_model[0]


@pytest.fixture
def model(run_and_model: tuple[Path, nn.Module]) -> nn.Module:
    return run_and_model[1]


def command(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def hub_reader(model: Any, directory: Path) -> HubReader:
    return HubReader(directory, model.hub_layout(), parameter_shapes(model))


def whole(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def assert_holds(directory: Path, model: Any, dtype: torch.dtype) -> None:
    reader = hub_reader(model, directory)
    for name, parameter in model.named_parameters():
        value = reader.read(name)
        assert value.dtype == dtype
        assert torch.equal(value, parameter.to(dtype)), name


def test_the_newest_checkpoint_of_a_run(
    run: Path, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "--to", tmp_path / "hub") == 0
    assert_holds(tmp_path / "hub", model, torch.float32)
    shown = capsys.readouterr().out
    assert "in 1 file, from" in shown
    assert "step-00000010 (step 10)" in shown
    assert "no processor_config.json: transformers takes images of 490 or 980 pixels" in shown
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architectures"] == ["AriaForConditionalGeneration"]
    assert config["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_named_checkpoint_in_bf16_and_in_shards(run: Path, model: Any, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000007"
    size = ("--max-shard-size", "0.1MB", "--dtype", "bf16")
    assert command(checkpoint, "--to", tmp_path / "deep" / "hub", *size) == 0
    hub = tmp_path / "deep" / "hub"
    assert len(list(hub.glob("model-*-of-*.safetensors"))) > 3
    assert json.loads((hub / "config.json").read_text())["dtype"] == "bfloat16"
    reader = hub_reader(model, hub)
    first, *others = [name for name, _ in model.named_parameters()]
    assert torch.equal(reader.read(first), torch.full_like(model.get_parameter(first), 7).bfloat16())
    for name in others:
        assert torch.equal(reader.read(name), model.get_parameter(name).bfloat16()), name


def test_transformers_loads_model_and_tokenizer(run: Path, model: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert command(run, "--to", tmp_path / "hub") == 0
    loaded, report = transformers.AriaForConditionalGeneration.from_pretrained(
        tmp_path / "hub", output_loading_info=True
    )
    assert loaded.dtype == torch.float32
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.generation_config.eos_token_id == [0, 3]
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert (tokenizer.image_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (9, 1, 0)


def test_memory_does_not_grow_with_the_model(
    run: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every read only the shard under way is held, and of what was read before nothing."""
    read, seen, held = StoredTensors.read, list[weakref.ref[Tensor]](), list[int]()

    def watched(self: StoredTensors, name: str) -> Tensor:
        assert not any(ref() is not None for ref in seen), f"more than one whole tensor at {name}"
        inside = [value for value in gc.get_objects() if type(value) is Tensor]
        held.append(sum(value.untyped_storage().nbytes() for value in inside))
        tensor = read(self, name)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredTensors, "read", watched)
    # What was there before is no longer among the collector's objects.
    gc.freeze()
    try:
        assert command(run, "--to", tmp_path / "hub", "--max-shard-size", "0.2MB") == 0
    finally:
        gc.unfreeze()
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    assert len(seen) >= len(sizes)
    assert max(held) <= max(200_000, *sizes) < sum(sizes) / 2


def copied(run: Path, tmp_path: Path) -> Path:
    """The run with links for its checkpoints and a `config.yaml` of its own."""
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for checkpoint in (run / "checkpoints").iterdir():
        folder = copy / "checkpoints" / checkpoint.name
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).symlink_to(file)
    (copy / "config.yaml").write_text((run / "config.yaml").read_text())
    return copy


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage; whatever happens, no directory may appear."""
    yield copied(run, tmp_path)
    assert not (tmp_path / "hub").exists()


def refused(checkpoint: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the line of a command that must fail."""
    code = command(checkpoint, "--to", hub)
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return code, line


def test_no_checkpoint(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (broken / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    for path in (broken, broken / "checkpoints" / "step-00000007", broken / "nowhere"):
        code, line = refused(path, broken.parent / "hub", capsys)
        assert code == 2
        assert "neither a complete checkpoint nor a run directory" in line


def test_no_config(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "config.yaml").unlink()
    code, line = refused(broken, broken.parent / "hub", capsys)
    assert code == 2
    assert f"{broken / 'config.yaml'}, which is not there" in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_hidden_layers: 2", "num_hidden_layers: 3", "of another model than its config.yaml describes"),
        ("vocab_size: 6144", "vocab_size: 6145", "head.weight is (6144, 32) there and (6145, 32) here"),
        ("head_dim:", "head_dims:", "config.yaml, model: text.head_dims is not a known key"),
        ("model:", "modle:", "config.yaml has no model"),
        ("embedded:tokenizer.json", "gone.json", "config.yaml, collator: gone.json: no such file"),
        ("model:", "model: [", "cannot be read"),
    ],
)
def test_a_config_that_does_not_fit(
    broken: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    text = (broken / "config.yaml").read_text()
    assert old in text
    (broken / "config.yaml").write_text(text.replace(old, new))
    code, line = refused(broken, broken.parent / "hub", capsys)
    assert code == 2
    assert message in line


def test_a_damaged_shard(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = broken / "checkpoints" / "step-00000010" / "__0_0.distcp"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:1000])
    code, line = refused(broken, broken.parent / "hub", capsys)
    assert code == 1
    assert "is damaged (__0_0.distcp holds 1,000 bytes" in line


def test_a_directory_is_never_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hub").mkdir()
    assert command(run, "--to", tmp_path / "hub") == 2
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "hub").iterdir())


def test_a_balance_bias_is_not_lost_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = "model.text.moe.balance.bias_update_rate=1e-3"
    model = make_run(tmp_path / "zero", rate)
    assert any(name.endswith("expert_bias_E") for name, _ in persistent_tensors(model))
    assert command(tmp_path / "zero", "--to", tmp_path / "hub") == 0
    assert_holds(tmp_path / "hub", model, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomInit, "read", _with_bias(RandomInit.read))
        make_run(tmp_path / "moved", rate)
    assert command(tmp_path / "moved", "--to", tmp_path / "other") == 1
    assert "expert_bias_E is not zero" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def _with_bias(read: Any) -> Any:
    def moved(self: RandomInit, name: str, index: Any) -> Tensor:
        value: Tensor = read(self, name, index)
        return value + 0.5 if name == "text.layers.1.mlp.router.expert_bias_E" else value

    return moved


def test_node_limited_routing_is_not_lost_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", "model.text.moe.num_groups=2", "model.text.moe.top_groups=1")
    assert command(tmp_path / "run", "--to", tmp_path / "hub") == 2
    assert "top_groups=1 of 2 groups" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("0.5MB", 500_000)])
def test_sizes(text: str, size: int) -> None:
    assert export.shard_bytes(text) == size


@pytest.mark.parametrize("text", ["5", "0GB", "5 TB", ""])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("run", "--to", "hub", "--max-shard-size", text) == 2
    assert "is no size" in capsys.readouterr().err
