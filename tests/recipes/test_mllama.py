"""Mllama through every verb, small: trained, resumed, published, verified, asked, adapted, inspected."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cantata import cli
from tests.recipes.runner import final, metrics, run

TINY = (
    "model=mllama_mini",
    "collator=mllama_mini",
    "model.vision.hidden_size=16",
    "model.vision.intermediate_size=16",
    "model.vision.num_hidden_layers=2",
    "model.vision.num_attention_heads=2",
    "model.text.hidden_size=32",
    "model.text.intermediate_size=32",
    "model.text.num_hidden_layers=3",
    "model.text.cross_attention_layers=[1]",
    "model.text.num_attention_heads=2",
    "model.text.num_key_value_heads=1",
    "model.text.head_dim=16",
    "train.sequence_length=64",
    "train.micro_batch_size=2",
    "train.eval_every=0",
    "train.log_every=1",
    "engine.precision=fp32",
    "data.num_workers=0",
    "schedule.warmup_steps=1",
)
WITHOUT_TOWER = [one for one in TINY if "model.vision." not in one]
FINE_TUNE = (*TINY, "accuracy.samples=2", "accuracy.max_new_tokens=2", "train.max_steps=2")
ADAPTER = (
    "+parameters={text.*: {learning_rate: null, weight_decay: null, frozen: true},"
    " head.*: {learning_rate: null, weight_decay: null, frozen: true},"
    " text.layers.1.*: {learning_rate: null, weight_decay: null, frozen: false}}"
)


class Made:
    """A run, what was published of it, and a picture."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "mllama"
        self.hub = folder / "hub"
        self.red = folder / "red.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found = Made(tmp_path_factory.mktemp("mllama"))
    given = ("train.max_steps=3", "train.eval_every=3", "checkpoint.every=1")
    assert run("pretrain", *TINY, *given, f"out={found.model}") == 0
    assert cli.main(["export", str(found.model), "--to", str(found.hub)]) == 0
    Image.new("RGB", (90, 30), "red").save(found.red)
    return found


def test_it_trains_and_captions(made: Made) -> None:
    lines = metrics(made.model)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss/image"]) for line in lines)
    samples = (made.model / "samples" / "step-00000003.jsonl").read_text().splitlines()
    assert all("caption" in json.loads(line) for line in samples)


def test_a_run_goes_on_bit_for_bit(made: Made, tmp_path: Path) -> None:
    given = ("train.eval_every=3", "checkpoint.every=1", f"out={tmp_path / 'twice'}")
    assert run("pretrain", *TINY, *given, "train.max_steps=1") == 0
    assert run("pretrain", *TINY, *given, "train.max_steps=3") == 0
    once, twice = final(made.model), final(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_what_is_published_equals_transformers(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert cli.main(["verify", str(made.hub)]) == 0
    assert "equal to transformers" in capsys.readouterr().out


def test_the_run_and_what_is_published_answer_alike(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for path in (made.model, made.hub):
        arguments = ["--prompt", "What?", "--image", str(made.red), "--max-new-tokens", "5", "--raw"]
        assert cli.main(["generate", str(path), *arguments]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_text_alone_from_the_same_folder(made: Made, tmp_path: Path) -> None:
    """Without its tower the published model is fine-tuned on texts, and published for text alone."""
    lines = (json.dumps({"text": f"Two households, number {i}"}) for i in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    text = (
        f"data.sources.text.dataset.path={tmp_path / 'text.jsonl'}",
        "data.streams=2",
        "model.vision=null",
    )
    given = (*WITHOUT_TOWER, "data=text", "data.num_workers=0", *text, "train.max_steps=2")
    assert run("pretrain", *given, f"model.weights={made.hub}", f"out={tmp_path / 'text'}") == 0
    assert cli.main(["export", str(tmp_path / "text"), "--to", str(tmp_path / "hub")]) == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architectures"] == ["MllamaForCausalLM"]


def test_images_without_a_tower_end_a_run_with_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("model.vision=null", "train.max_steps=1")
    assert run("pretrain", *WITHOUT_TOWER, *given, f"out={tmp_path / 'text'}") == 1
    assert "the model has no vision tower (model.vision=null)" in capfd.readouterr().err.splitlines()[-1]


def test_the_adapter_stage_moves_what_reads_images(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    given = (*TINY, ADAPTER, "train.max_steps=2", f"model.weights={made.hub}")
    assert run("pretrain", *given, f"out={out}") == 0
    before, after = final(made.model), final(out)
    moved = {
        name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])
    }
    assert moved
    assert all(
        name.startswith(("model.vision.", "model.projector.", "model.text.layers.1.")) for name in moved
    )


def test_fine_tuned_and_adapted(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (*FINE_TUNE, f"model.weights={made.hub}")
    assert run("sft", *given, f"out={tmp_path / 'sft'}") == 0
    assert run("lora", *given, f"out={tmp_path / 'lora'}") == 0
    for stage in ("sft", "lora"):
        assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / stage))
    adapters = [
        name for name in final(tmp_path / "lora") if ".cross_attn." in name and name.startswith("model.")
    ]
    assert len(adapters) == 4 * 2
    assert cli.main(["export", str(tmp_path / "lora"), "--to", str(tmp_path / "peft")]) == 0
    answers = []
    for path in ([str(made.hub), "--adapter", str(tmp_path / "peft")], [str(tmp_path / "lora")]):
        asked = ["--prompt", "Which group?", "--image", str(made.red), "--max-new-tokens", "4"]
        capsys.readouterr()
        assert cli.main(["generate", *path, *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_adapters_over_a_packed_base(made: Made, tmp_path: Path, bits: str) -> None:
    """Layers of both kinds rest packed; a run goes on bit for bit, and merges into whole weights."""
    base = (f"model.weights={made.hub}", f"lora.quantize_base={bits}")
    given = (*FINE_TUNE, *base, "lora.targets=[text.layers.*]", "checkpoint.every=1")
    for out, steps in (("once", 3), ("twice", 2), ("twice", 3)):
        assert run("lora", *given, f"train.max_steps={steps}", f"out={tmp_path / out}") == 0
    once, twice = final(tmp_path / "once"), final(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    report = (tmp_path / "once" / "logs" / "startup.txt").read_text()
    assert f"base {bits}" in report
    assert cli.main(["export", str(tmp_path / "once"), "--to", str(tmp_path / "hub"), "--merge"]) == 0
    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hub", made.hub))
    adapted = {name for name in before if not torch.equal(merged[name], before[name])}
    # Seven linear layers of each of three blocks; what no adapter is on is as published, not as packed.
    assert len(adapted) == 3 * 7
    assert all(".layers." in name and "vision" not in name for name in adapted)


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path: Path) -> None:
    """A block of each kind, within what other sums give."""
    blocks = (
        *("model.vision.num_hidden_layers=1", "model.vision.num_global_layers=1"),
        *("model.vision.intermediate_layers=[0]", "model.text.num_hidden_layers=2"),
    )
    found = []
    for compiled in ("true", "false"):
        out = tmp_path / compiled
        given = (*TINY, *blocks, "train.max_steps=2", f"train.compile={compiled}", f"out={out}")
        assert run("pretrain", *given) == 0
        found.append(metrics(out))
    for mine, eager in zip(*found, strict=True):
        assert mine["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-4)


def test_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image is one token, shown as the canvas of its tiles."""
    given = [*TINY, f"out={tmp_path}"]
    assert cli.main(["inspect", "pretrain", *given, "--rows", "2", "--samples", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"]["emoji"]["kept"] > 0
    assert found["modalities"]["image"] > 0


def test_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "pretrain", "experiment=mllama_mini", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens_per_step"] == 2 * 256
    # One image a row, each of four tiles of sixteen patches.
    assert (plan["micro_batch"]["images"], plan["micro_batch"]["patches"]) == (2, 128)
