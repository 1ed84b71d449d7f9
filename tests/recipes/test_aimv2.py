"""From pretraining to a published encoder, its probe, and a contrastive model on it: the whole way, small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cantata import cli
from tests.recipes.runner import TINY as TINY_ARIA
from tests.recipes.runner import final, metrics, run, tensors

SMALL = (
    *("model.vision.hidden_size=32", "model.vision.intermediate_size=48", "model.vision.num_hidden_layers=1"),
    *("model.vision.num_attention_heads=2", "train.log_every=1", "engine.precision=fp32"),
    *("data.num_workers=0", "data.streams=2", "schedule.warmup_steps=1", "train.sequence_length=256"),
)
TINY_AIMV2 = (
    "experiment=aimv2_mini",
    *SMALL,
    *("model.decoder.hidden_size=32", "model.decoder.intermediate_size=48"),
    *("model.decoder.num_hidden_layers=1", "model.decoder.num_attention_heads=2"),
    *("train.micro_batch_size=1", "train.eval_every=0"),
)
TINY_LIT = (
    "experiment=aimv2_mini_lit",
    *SMALL,
    *("model.text.hidden_size=24", "model.text.intermediate_size=32", "model.text.num_hidden_layers=1"),
    *("model.text.num_attention_heads=2", "train.micro_batch_size=1", "train.eval_every=0"),
)
HELD_OUT = "data.held_out.emoji.dataset.held_out_share=0.01"


class Made:
    """A pretrained encoder, published, and a contrastive model on it."""

    def __init__(self, folder: Path) -> None:
        self.run, self.hub, self.lit = folder / "aimv2", folder / "aimv2-hf", folder / "lit"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found = Made(tmp_path_factory.mktemp("aimv2"))
    given = ("train.max_steps=3", "train.eval_every=3", HELD_OUT)
    assert run("pretrain", *TINY_AIMV2, *given, f"out={found.run}") == 0
    assert cli.main(["export", str(found.run), "--to", str(found.hub)]) == 0
    weights = f"model.vision_weights={found.hub}"
    assert run("pretrain", *TINY_LIT, *given, weights, f"out={found.lit}") == 0
    return found


def test_it_learns_patches_and_captions(made: Made) -> None:
    lines = metrics(made.run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/tokens"] + 0.4 * line["loss/patches"], rel=1e-5)
    assert {"eval/loss", "eval/loss/tokens", "eval/loss/patches", "eval/initial/loss/patches"} <= {
        *lines[0],
        *lines[2],
    }
    captions = (made.run / "samples" / "step-00000003.jsonl").read_text().splitlines()
    assert captions
    assert all(isinstance(json.loads(line)["caption"], str) for line in captions)


def test_the_published_folder_holds_the_encoder_alone(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(made.hub / "model.safetensors")
    saved = final(made.run)
    assert torch.equal(stored["rms_norm.weight"], saved["model.vision.rms_norm.weight"])
    assert not any("decoder" in key for key in stored)
    assert len(stored) == sum(name.startswith("model.vision.") for name in saved)
    assert (made.hub / "preprocessor_config.json").is_file()
    assert cli.main(["export", str(made.run), "--to", str(tmp_path / "again")]) == 0
    assert "only training needs decoder, head, pixel_head" in capsys.readouterr().out
    assert cli.main(["verify", str(made.hub)]) == 0
    assert "equal to transformers" in capsys.readouterr().out


def test_a_frozen_tower_starts_from_the_published_one_and_stays(made: Made) -> None:
    state, encoder = final(made.lit), final(made.run)
    tower = [name for name in state if name.startswith("model.vision.") and ".head." not in name]
    assert tower
    assert all(torch.equal(state[name], encoder[name]) for name in tower)
    assert not any(name.startswith("optimizer.vision.layers") for name in state)
    assert any(name.startswith("optimizer.vision.head") for name in state)
    report = " ".join((made.lit / "logs" / "startup.txt").read_text().split())
    assert f"{len(tower)} tensors from {made.hub}, others new" in report
    line = metrics(made.lit)[-1]
    assert 0 < line["eval/retrieval"] <= 1
    assert math.isfinite(line["eval/loss"])


def test_a_contrastive_model_is_published_and_read_again(made: Made, tmp_path: Path) -> None:
    assert cli.main(["export", str(made.lit), "--to", str(tmp_path / "hub")]) == 0
    assert cli.main(["verify", str(tmp_path / "hub")]) == 0
    weights = (f"model.weights={tmp_path / 'hub'}", "model.vision_weights=null", "train.max_steps=1")
    assert run("pretrain", *TINY_LIT, *weights, f"out={tmp_path / 'on'}") == 0
    assert metrics(tmp_path / "on")[0]["loss"] < math.log(100)


def test_probes(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name, model in {"run": made.run, "hub": made.hub}.items():
        assert cli.main(["probe", str(model), "--steps", "20", "--held-out-share", "0.1", "--json"]) == 0
        shown[name] = json.loads(capsys.readouterr().out)
    assert shown["run"] == shown["hub"]
    assert shown["run"]["train_images"] + shown["run"]["test_images"] == 1906
    assert 0 < shown["run"]["accuracy"] <= 1
    ask = ["--zero-shot", "{label}", "--held-out-share", "0.1", "--json"]
    assert cli.main(["export", str(made.lit), "--to", str(tmp_path / "hub")]) == 0
    found = []
    for model in (made.lit, tmp_path / "hub"):
        capsys.readouterr()
        assert cli.main(["probe", str(model), *ask]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_plans(capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in {"aimv2_mini": 8 * 512, "aimv2_mini_lit": 4 * 512}.items():
        assert cli.main(["plan", "pretrain", f"experiment={name}", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["tokens_per_step"] == rows
        assert plan["micro_batch"]["patches"] == 64 * plan["micro_batch"]["images"] > 0
        assert plan["memory"]["activations"] > 0


def test_inspection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("aimv2_mini", "aimv2_mini_lit"):
        page = tmp_path / f"{name}.html"
        given = ["inspect", "pretrain", f"experiment={name}", "--rows", "2", "--to", str(page), "--json"]
        assert cli.main(given) == 0
        emoji = json.loads(capsys.readouterr().out)["sources"]["emoji"]
        assert emoji["images"] == 3
        assert emoji["target_weight"] == pytest.approx(round(emoji["target_weight"]), rel=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=next_token collator=aimv2_pairs_mini", "pretraining puts a placeholder for every patch"),
        ("objective=contrastive", "Aimv2Pretraining compares no images with texts"),
        ("collator._target_=cantata.data.collate.PackedCollator", "the collator draws no prefix"),
        ("model=aria_mini collator=aria_mini", "Aria predicts no patches"),
    ],
)
def test_what_does_not_go_together(
    override: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("pretrain", "experiment=aimv2_mini", *override.split(), f"out={tmp_path / 'run'}") == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_aria_on_the_published_encoder(made: Made, tmp_path: Path) -> None:
    """Its tower begins as the encoder and learns on; a run continues bit for bit."""
    given = (
        "experiment=aria_mini_aimv2",
        f"model.vision.weights={made.hub}",
        *(one for one in SMALL if one.startswith("model.vision.")),
        *(one for one in TINY_ARIA if one.startswith(("model.text.", "engine.", "data.", "train."))),
        *("data.streams=2", "schedule=constant", "checkpoint.every=1", "optimizer.lr=1e-3"),
    )
    for out, steps in (("once", 3), ("twice", 2), ("twice", 3)):
        assert run("pretrain", *given, f"train.max_steps={steps}", f"out={tmp_path / out}") == 0
    once, twice = final(tmp_path / "once"), final(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    encoder = final(made.run)
    tower = [name for name in once if name.startswith("model.vision.")]
    moved = [float((once[name] - encoder[name]).abs().max()) for name in tower]
    # Three steps of AdamW at a rate of 1e-3 move no weight further.
    assert min(moved) > 0
    assert max(moved) < 4e-3
    report = " ".join((tmp_path / "once" / "logs" / "startup.txt").read_text().split())
    assert f"{len(tower)} tensors from {made.hub}, others new" in report


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [TINY_AIMV2, (*TINY_LIT, "model.vision_weights=null")], ids=["next", "lit"])
def test_compiled_equals_eager(tiny: tuple[str, ...], tmp_path: Path) -> None:
    given, found = (*tiny, "train.max_steps=2"), []
    for compiled in ("true", "false"):
        out = tmp_path / compiled
        assert run("pretrain", *given, f"train.compile={compiled}", f"out={out}") == 0
        found.append(metrics(out))
    for mine, eager in zip(*found, strict=True):
        assert mine["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_native_images_and_a_resume(tmp_path: Path) -> None:
    """Images of all areas, packed; stopped and continued it ends in the same bits."""
    area = "{_target_: cantata.data.augment.RandomArea, patch_size: 8, least_log2: 3, most_log2: 6}"
    native = (
        *("model.vision.is_native=true", "model.vision.image_size=256", "collator.processor.is_native=true"),
        *("collator.processor.image_size=256", f"data.sources.emoji.augment={area}"),
    )
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        given = (f"train.max_steps={steps}", "checkpoint.every=2", "schedule=constant", "~schedule.min_ratio")
        assert run("pretrain", *TINY_AIMV2, *native, *given, f"out={tmp_path / out}") == 0
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts]
    one, other = (tensors(tmp_path / out / "checkpoints" / "step-00000004") for out in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert len({line["tokens"] for line in whole}) == 4
