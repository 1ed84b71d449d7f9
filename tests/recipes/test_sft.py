"""The fine-tuning recipe: from an exported model, judged by its answers, ended early, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cantata import cli
from tests.recipes.runner import final, metrics, pretrain, sft, start, torchrun
from tests.recipes.test_pretrain import finish, same

SCRATCH = ("model.weights=null", "schedule=constant")
STOPS = (
    "train.eval_every=1",
    "train.early_stopping={metric: eval/loss, mode: min, patience: 1, min_delta: 9}",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pretraining run of one step and its Hugging Face directory."""
    folder = tmp_path_factory.mktemp("exported")
    assert pretrain(folder / "run", "train.max_steps=1") == 0
    assert cli.main(["export", str(folder / "run"), "--to", str(folder / "hf")]) == 0
    return folder / "run", folder / "hf"


def test_it_starts_from_an_exported_model_and_asks_before_the_first_step(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, hub = exported
    out = tmp_path / "run"
    assert sft(out, f"model.weights={hub}", "optimizer.lr=0", "train.max_steps=1", "train.eval_every=1") == 0
    before, after = final(run), final(out)
    names = [name for name in before if name.startswith("model.")]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names)
    [line] = metrics(out)
    for name in ("loss", "loss/emoji", "accuracy", "accuracy/emoji", "majority", "questions"):
        assert line[f"eval/{name}"] == line[f"eval/initial/{name}"] >= 0, "nothing has been learned"
    assert line["eval/loss"] == line["eval/loss/emoji"]
    assert "loss/image" in line
    assert "loss/text" not in line
    asked = [json.loads(text) for text in (out / "samples/step-00000001.jsonl").read_text().splitlines()]
    assert [list(one) for one in asked] == [["sample", "truth", "answer", "right", "images"]] * 2
    assert all((out / "samples" / one["images"][0]).is_file() for one in asked)


def test_weights_must_be_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sft(tmp_path / "run") == 2
    assert "error: model.weights must be given" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parts_are_frozen_by_pattern(tmp_path: Path) -> None:
    rule = "{learning_rate: null, weight_decay: null, frozen: true}"
    patterns = ("vision.*", "projector.*", "text.layers.0.*", "*.router.*")
    overrides = [f"+parameters={{{', '.join(f'{one}: {rule}' for one in patterns)}}}"]
    assert sft(tmp_path / "whole", *SCRATCH, "train.max_steps=1", "optimizer.lr=0") == 0
    assert sft(tmp_path / "part", *SCRATCH, "train.max_steps=1", *overrides) == 0
    start, end = final(tmp_path / "whole"), final(tmp_path / "part")
    moved = {name for name in end if name.startswith("model.") and not torch.equal(start[name], end[name])}
    assert any(name.startswith("model.text.layers.1.") for name in moved)
    assert not [
        name for name in moved if name.startswith(("model.vision", "model.proj", "model.text.layers.0"))
    ]
    assert not [name for name in moved if ".router." in name]


@pytest.mark.slow
def test_it_ends_early_and_stays_ended(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = (*SCRATCH, *STOPS, "train.max_steps=9", "accuracy.samples=0")
    assert sft(out, *settings) == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]
    assert (out / "LATEST").read_text() == "step-00000002\n"
    assert sft(out, *settings) == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]


@pytest.mark.slow
def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = "checkpoint.best={metric: eval/loss, mode: max}"
    settings = (*SCRATCH, best, "train.eval_every=1", "checkpoint.keep=1", "accuracy.samples=0")
    assert sft(out, *settings, "train.max_steps=3") == 0
    losses = {line["step"]: line["eval/loss"] for line in metrics(out)}
    assert (out / "BEST").read_text() == f"step-{max(losses, key=lambda step: losses[step]):08d}\n"
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {(out / "BEST").read_text().strip(), "step-00000003"}


@pytest.mark.parametrize("key", ["checkpoint.best={metric: eval/loss, mode: min}", STOPS[1]])
def test_going_by_an_evaluation_needs_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    assert sft(tmp_path / "run", *SCRATCH, key) == 2
    assert f"{key.partition('=')[0]}.metric needs evaluations" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_with_noise_resumes_bit_for_bit(tmp_path: Path) -> None:
    noise = (*SCRATCH, "accuracy.samples=0", "train.neftune_alpha=5")
    assert sft(tmp_path / "once", *noise, "train.max_steps=3") == 0
    assert sft(tmp_path / "twice", *noise, "train.max_steps=1") == 0
    assert sft(tmp_path / "twice", *noise, "train.max_steps=3") == 0
    same(final(tmp_path / "once"), final(tmp_path / "twice"))
    assert sft(tmp_path / "quiet", *SCRATCH, "accuracy.samples=0", "train.max_steps=3") == 0
    assert metrics(tmp_path / "quiet")[-1]["loss"] != metrics(tmp_path / "once")[-1]["loss"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_figures_of_one_and_stop_together(tmp_path: Path) -> None:
    settings = (*SCRATCH, *STOPS, "train.max_steps=9", "accuracy.samples=5", "optimizer.lr=0")
    assert sft(tmp_path / "one", *settings, "train.micro_batch_size=2") == 0
    finish(start(torchrun(2), tmp_path / "two", *settings, stage="sft"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    for name in (name for name in one[-1] if name.startswith("eval/")):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-5), name
    said = [
        sorted((tmp_path / run / "samples/step-00000002.jsonl").read_text().splitlines())
        for run in ("one", "two")
    ]
    assert said[0] == said[1]
    assert len(said[0]) == 5
