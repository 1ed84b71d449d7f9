"""The tokenizer recipe: every quantiser, with and without a critic, exact resume, and what it refuses."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from cantata.core.errors import PREEMPTED
from cantata.core.locate import configs_dir
from tests.data.media.clips import encoded_clip
from tests.recipes.runner import SMALL_EMA, TINY_VQ, final, kill, metrics, run, start, vq
from tests.recipes.test_pretrain import CONTRACT, finish, same, wait_for

CRITIC = (
    "critic=patchgan",
    "critic.discriminator.base_channels=8",
    "critic.discriminator.layers=1",
    "critic.discriminator.norm_groups=2",
    "critic.start_discriminator=1",
    "critic.start_generator=2",
    "critic.lecam=0.1",
)
QUANTIZERS = sorted(path.stem for path in (configs_dir() / "quantizer").glob("*.yaml"))
FEW_HELD_OUT = "data.held_out.emoji.dataset.held_out_share=0.01"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 5 steps on one process, with critic, moving averages and evaluations."""
    out = tmp_path_factory.mktemp("vq") / "run"
    assert vq(out, *whole_settings()) == 0
    return out


def whole_settings() -> tuple[str, ...]:
    return (
        *SMALL_EMA,
        *CRITIC,
        FEW_HELD_OUT,
        "train.max_steps=5",
        "train.eval_every=4",
        "checkpoint.every=2",
    )


def test_a_run_leaves_what_the_contract_names(whole_run: Path) -> None:
    assert (whole_run / "LATEST").read_text() == "step-00000005\n"
    for name in ("config.yaml", "logs/rank-0.log", "logs/startup.txt"):
        assert (whole_run / name).is_file()
    steps = sorted(path.name for path in (whole_run / "samples").iterdir())
    assert steps == ["step-00000000.png", "step-00000004.png", "step-00000005.png"]
    with Image.open(whole_run / "samples" / steps[-1]) as picture:
        rows, columns = 2, min(16, picture.width // 16)
        assert picture.size == (columns * 18 - 2, rows * 18 - 2)


def test_metrics_lines_follow_the_contract(whole_run: Path) -> None:
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert list(line)[: len(CONTRACT)] == CONTRACT
        assert line["tokens"] == line["target_tokens"] == line["step"] * 4 * 16
        assert {"loss/image", "loss/l2", "loss/commitment", "usage", "perplexity"} <= line.keys()
        assert all(value is None or math.isfinite(value) for value in line.values())
    assert "loss/discriminator" not in lines[0]
    assert "loss/adversarial" not in lines[1]
    assert {"loss/discriminator", "loss/adversarial", "loss/adaptive_weight"} <= lines[2].keys()
    names = ("loss", "psnr", "ssim", "usage", "perplexity", "loss/l2", "loss/image", "loss/emoji")
    assert all(f"eval/initial/{name}" in lines[0] for name in names)
    for line in (lines[3], lines[4]):
        assert all(math.isfinite(line[f"eval/{name}"]) for name in names)
    assert 1 < lines[4]["eval/perplexity"] <= 32


def test_the_loss_of_a_step_is_that_of_its_terms(whole_run: Path) -> None:
    """Coefficients as configured: l2 1, commitment 0.25, and of the critic what the adaptive weight says."""
    first = metrics(whole_run)[0]
    assert first["loss"] == pytest.approx(first["loss/l2"] + 0.25 * first["loss/commitment"], rel=1e-6)


def test_the_same_command_after_the_end_changes_nothing(whole_run: Path) -> None:
    before, weights = (whole_run / "metrics.jsonl").read_text(), final(whole_run)
    assert vq(whole_run, *whole_settings()) == 0
    assert (whole_run / "metrics.jsonl").read_text() == before
    same(final(whole_run), weights)


def test_a_checkpoint_holds_averages_codebook_and_critic(whole_run: Path) -> None:
    found = final(whole_run)
    assert torch.equal(found["model.quantizer.updates"], torch.tensor(5))
    assert torch.equal(found["critic.steps"], torch.tensor(5))
    weights = {name.removeprefix("model.") for name in found if name.startswith("model.")}
    trained = {name for name in weights if not name.startswith("quantizer.")}
    assert {name for name in trained if f"optimizer.{name}.ema" in found} == trained
    assert any(name.startswith("critic.optimizer.") for name in found)


@pytest.mark.slow
def test_a_longer_run_continues_a_finished_one_bit_for_bit(tmp_path: Path) -> None:
    """Stopped when the critic has learned one step and the model has not heard of it."""
    constant = (*SMALL_EMA, *CRITIC, "schedule=constant", "~schedule.min_ratio", "~schedule.decay_steps")
    assert vq(tmp_path / "once", *constant, "train.max_steps=5") == 0
    assert vq(tmp_path / "twice", *constant, "train.max_steps=2") == 0
    assert vq(tmp_path / "twice", *constant, "train.max_steps=5") == 0
    same(final(tmp_path / "once"), final(tmp_path / "twice"))


@pytest.mark.slow
def test_kill_9_and_the_same_command_end_bit_for_bit_alike(tmp_path: Path) -> None:
    """Killed once at some step and once while a checkpoint is written; the critic starts in between."""
    settings = (
        *SMALL_EMA,
        *CRITIC,
        "critic.start_discriminator=6",
        "critic.start_generator=12",
        "train.max_steps=30",
        "checkpoint.every=4",
        "data.num_workers=1",
    )
    finish(start([], tmp_path / "whole", *settings, stage="vq"))
    out = tmp_path / "killed"
    run = start([], out, *settings, stage="vq")
    wait_for(run, lambda: len(metrics(out)) >= 7)
    kill(run)
    run = start([], out, *settings, stage="vq")
    wait_for(run, lambda: len(metrics(out)) >= 14 and any(out.glob("checkpoints/*.incomplete")))
    kill(run)
    assert len(metrics(out)) < 30
    finish(start([], out, *settings, stage="vq"))
    same(final(tmp_path / "whole"), final(out))
    told, wanted = metrics(out), metrics(tmp_path / "whole")
    assert [line["step"] for line in told] == list(range(1, 31))
    assert [line["loss"] for line in told] == [line["loss"] for line in wanted]


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_run_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start([], out, *SMALL_EMA, "train.max_steps=100000", stage="vq")
    wait_for(run, lambda: len(metrics(out)) >= 2)
    run.terminate()
    assert run.wait(timeout=60) == PREEMPTED
    run.communicate()
    last = metrics(out)[-1]["step"]
    assert (out / "LATEST").read_text().strip() == f"step-{last:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantiser_trains(tmp_path: Path, quantizer: str) -> None:
    assert vq(tmp_path / "run", f"quantizer@model.quantizer={quantizer}", "train.max_steps=2") == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["perplexity"] >= 1 for line in lines)


@pytest.mark.slow
def test_images_of_several_sizes_train_in_batches_of_one_size(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(8):
        for name, size in (("wide", (40, 20)), ("square", (20, 20)), ("tall", (20, 40))):
            Image.new("RGB", size, (index * 30, 100, 200)).save(folder / f"{name}{index}.png")
    given = (*SMALL_EMA, *images_of(folder), "collator.sizes=[[16,16],[8,16],[16,8]]", "train.max_steps=6")
    assert vq(tmp_path / "run", *given) == 0
    lines = metrics(tmp_path / "run")
    codes = [lines[0]["tokens"], *(b["tokens"] - a["tokens"] for a, b in pairwise(lines))]
    assert sorted(set(codes)) == [4 * 8, 4 * 16]


def images_of(path: Path) -> tuple[str, ...]:
    """Overrides that train on a folder of images or clips, and hold nothing out."""
    conversations = (
        "{_target_: cantata.data.conversations.Conversations, records: folder, format: image, "
        f"path: {path}, template: null, root: null, split: train, held_out_share: 0.0, "
        "video: {sampling: uniform, num_frames: 4, fps: 1.0, max_frames: 4, start: 0.0, end: null, "
        "longest_side: 64, max_pixels: 1000000, max_decoded: 100}, "
        "pdf: {pages: all, scale: 1.0, max_pages: 1, max_pixels: 1000000}}"
    )
    source = "{weight: 1.0, on_error: skip, max_skipped: null, augment: null, dataset: " + conversations + "}"
    return ("~data.sources.emoji", f"+data.sources.own={source}", "~data.held_out.emoji", "data.streams=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("collator.sizes=[[16,18]]",), "both sides must be multiples of 4"),
        (("collator.sizes=[]",), "collator.sizes is empty"),
        (("collator.frames=4",), "takes images only"),
        (("model.quantizer.num_code=8",), "num_code"),
        (("model.quantizer.decay=2",), "decay"),
        (("quantizer@model.quantizer=vqq",), "vqq"),
        (("loss.l2=0",), "loss: l1, l2, perceptual are all 0"),
        (("loss.perceptual=1",), "needs a network: set perceptual=mobilenet or lpips"),
        (("mesh.ep=2",), "an image tokenizer has no experts; set mesh.ep=1"),
        (("data.sources.emoji.dataset.path=missing.parquet",), "missing.parquet"),
        (("train.sequence_length=8",), "train.sequence_length is not a known key"),
        (("model.weights=missing",), "missing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    assert vq(tmp_path / "run", *overrides) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert [line for line in error if line.startswith("error:")] == error[-1:]
    assert message in error[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs cantata[deepspeed]")
def test_deepspeed_would_round_a_codebook_that_learns_by_gradients(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("engine=deepspeed", "engine.zero_stage=2", "engine.precision=bf16")
    assert vq(tmp_path / "run", *given, "quantizer@model.quantizer=vq", "train.max_steps=1") == 2
    assert "quantizer.codebook_KD, which must stay fp32" in capfd.readouterr().err


@pytest.mark.slow
def test_damaged_images_are_left_out_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for index in range(6):
        Image.new("RGB", (20, 20), (index * 30, 100, 200)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    assert vq(tmp_path / "run", *SMALL_EMA, *images_of(tmp_path), "train.max_steps=3") == 0
    assert "corrupt image" in capfd.readouterr().out + (tmp_path / "run" / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 4])
def test_emu3s_tokenizer_trains_on_images_and_clips(tmp_path: Path, frames: int) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for index in range(2):
        if frames > 1:
            (folder / f"{index}.mp4").write_bytes(encoded_clip(6, size=(32, 32)))
        else:
            Image.new("RGB", (20, 20), (index * 30, 100, 200)).save(folder / f"{index}.png")
    given = (
        "model=emu3_vqvae_mini",
        "quantizer@model.quantizer=emu3",
        "model.quantizer.num_codes=64",
        "model.shape.channel_multipliers=[1,1]",
        "model.shape.attention_levels=[]",
        "collator.sizes=[[16,16]]",
        f"collator.frames={frames}",
        "train.micro_batch_size=2",
        "train.max_steps=2",
    )
    plain = TINY_VQ[0], *TINY_VQ[6:]
    assert run("vq", *plain, *given, *images_of(folder), f"out={tmp_path / 'run'}") == 0
    lines = metrics(tmp_path / "run")
    assert [line["tokens"] for line in lines] == [2 * 64, 4 * 64]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert ("loss/video" if frames > 1 else "loss/image") in lines[0]


@pytest.mark.slow
def test_a_critic_cannot_come_or_go_within_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, first, then in (("without", (), CRITIC), ("with", CRITIC, ())):
        assert vq(tmp_path / name, *SMALL_EMA, *first, "train.max_steps=1") == 0
        capfd.readouterr()
        assert vq(tmp_path / name, *SMALL_EMA, *then, "train.max_steps=2") in (1, 2)
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error:")
        assert "critic" in error
