"""What a run says of its experts: counts that miss nothing and count nothing twice, and pictures."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.recipes.runner import kill, metrics, pretrain, start, torchrun
from tests.recipes.test_pretrain import finish, wait_for

pytestmark = pytest.mark.slow

TOP_K, SHAPE = 2, (2, 3, 4)
SETTINGS = (
    *("train.max_steps=8", "train.expert_every=3", "checkpoint.every=5", "checkpoint.background=false"),
    *("train.eval_every=4", "train.recompute=full", "train.gradient_accumulation_steps=2"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps with evaluation, recomputation, accumulation and padded rows."""
    out = tmp_path_factory.mktemp("experts") / "run"
    assert pretrain(out, *SETTINGS) == 0
    return out


def test_every_token_is_counted_once_in_every_layer(run: Path) -> None:
    """Padding, held-out passes and recomputation would show as tokens too many."""
    entries = np.load(run / "experts" / "counts.npy")
    assert entries["last_step"].tolist() == [3, 6, 8]
    assert entries["first_step"].tolist() == [1, 4, 7]
    assert entries["tokens_per_expert"].shape == (3, *SHAPE)
    lines = metrics(run)
    for entry in entries:
        before = lines[entry["first_step"] - 2]["tokens"] if entry["first_step"] > 1 else 0
        tokens = lines[entry["last_step"] - 1]["tokens"] - before
        assert tokens < 512 * 2 * (entry["last_step"] - entry["first_step"] + 1), "no row was padded"
        assert entry["tokens_per_expert"].sum((1, 2)).tolist() == [tokens * TOP_K] * SHAPE[0]


def test_lines_of_metrics_speak_of_the_same_counts(run: Path) -> None:
    """One line over all steps, from the entries of the array."""
    out = run.parent / "one-line"
    assert pretrain(out, *SETTINGS, "train.log_every=8", "train.eval_every=0") == 0
    (line,) = metrics(out)
    counts_LE = np.load(run / "experts" / "counts.npy")["tokens_per_expert"].sum((0, 2))
    load_LE = counts_LE / counts_LE.mean(1, keepdims=True)
    assert line["experts/load_max"] == pytest.approx(load_LE.max(1).mean())
    assert line["experts/load_mean"] == pytest.approx((load_LE**2).mean())
    assert 0 <= line["experts/specialisation"] <= 1
    assert {"experts/specialisation/layer_01", "experts/load_mean/image/layer_00"} <= line.keys()


def test_each_modality_seen_has_a_picture(run: Path) -> None:
    assert {path.name for path in (run / "experts").iterdir()} == {"counts.npy", "text.png", "image.png"}
    for name in ("text", "image"):
        with Image.open(run / "experts" / f"{name}.png") as picture:
            assert picture.width > 300
            assert len(picture.getcolors(10_000) or []) > 10


def test_what_lies_after_the_checkpoint_is_made_again(run: Path, tmp_path: Path) -> None:
    """As after kill -9: the newest checkpoint is of step 5, inside an interval; entries go up to step 8."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    (out / "LATEST").write_text("step-00000005\n")
    assert pretrain(out, *SETTINGS) == 0
    assert (out / "experts" / "counts.npy").read_bytes() == (run / "experts" / "counts.npy").read_bytes()
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))


def test_without_an_interval_nothing_is_written(tmp_path: Path) -> None:
    assert pretrain(tmp_path, "train.max_steps=1", "train.expert_every=0") == 0
    assert not (tmp_path / "experts").exists()


def test_kill_9_leaves_no_gap_and_no_repeat(tmp_path: Path) -> None:
    settings = ("train.max_steps=30", "train.expert_every=3", "checkpoint.every=4")
    assert pretrain(tmp_path / "whole", *settings) == 0
    out, rng = tmp_path / "killed", random.Random(0)
    for steps in sorted(rng.sample(range(5, 28), 2)):
        process = start([], out, *settings)
        wait_for(process, lambda steps=steps: len(metrics(out)) >= steps)
        kill(process)
        assert len(metrics(out)) < 30
    finish(start([], out, *settings))
    counts = [(tmp_path / name / "experts" / "counts.npy").read_bytes() for name in ("whole", "killed")]
    assert counts[0] == counts[1]


@pytest.mark.distributed
def test_a_rank_with_too_many_rows_is_named(tmp_path: Path) -> None:
    settings = ("mesh.ep=2", "train.max_steps=2", "train.expert_load_warning=1.001")
    process = start(torchrun(2), tmp_path, *settings)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "the even share of 1,024; its experts keep" in text
    counts = np.load(tmp_path / "experts" / "counts.npy")["tokens_per_expert"]
    assert counts.sum() == metrics(tmp_path)[-1]["tokens"] * TOP_K * SHAPE[0]
