"""The adapter recipe: small checkpoints with every adapter, exact resume, the same under every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cantata import cli
from tests.recipes.runner import final, lora, metrics, pretrain, start, torchrun
from tests.recipes.test_pretrain import finish, same

SCRATCH = ("model.weights=null", "schedule=constant", "accuracy.samples=0")
LONG = ("lora.dropout=0", "train.max_steps=3", "data.streams=4")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of one process."""
    out = tmp_path_factory.mktemp("lora") / "once"
    assert lora(out, *SCRATCH, *LONG, "train.micro_batch_size=2") == 0
    return out


def test_a_checkpoint_holds_every_adapter_and_nothing_else(once: Path) -> None:
    found = final(once)
    model = {
        name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")
    }
    attention = [
        f"text.layers.{i}.self_attn.{p}_proj.lora_{ab}" for i in (0, 1) for p in "qkvo" for ab in "AB"
    ]
    experts = [f"text.layers.{i}.mlp.experts.fc{n}_lora_{ab}" for i in (0, 1) for n in (1, 2) for ab in "AB"]
    shared = [
        f"text.layers.{i}.mlp.shared_experts.{part}_proj.lora_{ab}"
        for i in (0, 1)
        for part in ("gate", "up", "down")
        for ab in "AB"
    ]
    assert set(model) == {*attention, *experts, *shared, "head.lora_A", "head.lora_B"}
    assert all(tensor.any() for tensor in model.values()), "B has left its zeros everywhere"
    assert {name.split(".")[0] for name in found} == {"model", "optimizer", "rng"}


def test_the_report_counts_the_matches(once: Path) -> None:
    report = (once / "logs" / "startup.txt").read_text()
    assert "LoRA r 8, alpha 32, dropout 0 (new)" in report
    assert "text.layers.*  18 targets" in report


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_run_over_a_packed_base_resumes_bit_for_bit(tmp_path: Path, bits: str) -> None:
    given = (*SCRATCH, f"lora.quantize_base={bits}", "checkpoint.every=1")
    assert lora(tmp_path / "once", *given, "train.max_steps=3") == 0
    assert lora(tmp_path / "twice", *given, "train.max_steps=1") == 0
    assert lora(tmp_path / "twice", *given, "train.max_steps=3") == 0
    same(final(tmp_path / "once"), final(tmp_path / "twice"))
    assert f"base {bits}" in (tmp_path / "once" / "logs" / "startup.txt").read_text()


@pytest.mark.slow
def test_a_run_with_dropout_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert lora(tmp_path / "once", *SCRATCH, "train.max_steps=3") == 0
    assert lora(tmp_path / "twice", *SCRATCH, "train.max_steps=1") == 0
    assert lora(tmp_path / "twice", *SCRATCH, "train.max_steps=3") == 0
    same(final(tmp_path / "once"), final(tmp_path / "twice"))


def test_a_checkpoint_is_not_put_on_other_weights(once: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert lora(once, *SCRATCH, *LONG, "train.micro_batch_size=2", "seed=9", "train.max_steps=4") == 2
    assert "seed" in capfd.readouterr().err


def test_a_pattern_that_matches_nothing_ends_before_anything_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lora(tmp_path / "run", *SCRATCH, "lora.targets=[text.layers.*.query]") == 2
    error = capfd.readouterr().err
    assert "error: lora.targets: 'text.layers.*.query' matches no linear layer" in error
    assert not (tmp_path / "run").exists()


def test_it_starts_where_the_base_stands_and_goes_on_from_an_adapter(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "base", "train.max_steps=1") == 0
    hub, adapter = tmp_path / "hf", tmp_path / "adapter"
    assert cli.main(["export", str(tmp_path / "base"), "--to", str(hub)]) == 0
    given = (f"model.weights={hub}", "accuracy.samples=0", "train.eval_every=1", "schedule=constant")
    assert lora(tmp_path / "first", *given, "lora.dropout=0") == 0
    assert cli.main(["export", str(tmp_path / "first"), "--to", str(adapter)]) == 0
    more = (*given, "lora.dropout=0", f"lora.adapter={adapter}", "optimizer.lr=0", "train.max_steps=1")
    assert lora(tmp_path / "second", *more) == 0
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert second[0]["eval/initial/loss"] == pytest.approx(first[-1]["eval/loss"], rel=1e-6)
    assert second[0]["eval/initial/loss"] != first[0]["eval/initial/loss"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        ("engine=fsdp2", "mesh.ep=2"),
        ("engine=deepspeed", "engine.zero_stage=3"),
        ("engine=deepspeed", "engine.zero_stage=2", "mesh.ep=2"),
    ],
    ids=["fsdp2-ep2", "zero3", "zero2-ep2"],
)
def test_layouts_save_the_same_whole_adapter(once: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    """No tensor may be empty or partial, as they are elsewhere under ZeRO-3 (huggingface/trl#4416)."""
    finish(start(torchrun(2), tmp_path / "two", *SCRATCH, *LONG, *layout, stage="lora"))
    assert_alike(once, tmp_path / "two")


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `once`, over a base in four bits."""
    out = tmp_path_factory.mktemp("lora") / "packed"
    assert lora(out, *SCRATCH, *LONG, "train.micro_batch_size=2", "lora.quantize_base=nf4") == 0
    return out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        ("engine=fsdp2",),
        ("engine=deepspeed", "engine.zero_stage=3"),
        ("engine=deepspeed", "engine.zero_stage=2", "mesh.ep=2"),
    ],
    ids=["fsdp2", "zero3", "zero2-ep2"],
)
def test_layouts_over_a_packed_base_save_the_same_whole_adapter(
    packed_once: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    packed = "lora.quantize_base=nf4"
    finish(start(torchrun(2), tmp_path / "two", *SCRATCH, *LONG, packed, *layout, stage="lora"))
    assert_alike(packed_once, tmp_path / "two")


def assert_alike(first: Path, second: Path) -> None:
    one, two = final(first), final(second)
    names = {name for name in one if not name.startswith("rng.")}
    assert names == {name for name in two if not name.startswith("rng.")}
    for name in names:
        torch.testing.assert_close(two[name].float(), one[name].float(), rtol=0, atol=2e-6, msg=name)
