"""Bad input: one line on standard error, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.recipes.runner import metrics, pretrain


def refusal(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, log lines and warnings apart."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_stpes=3", "nearest: train.max_steps"),
        ("experiment=aria_mni", "nearest: aria_mini"),
        ("train.max_steps=soon", "train.max_steps"),
        ("engine.precision=fp8", "fp8"),
        ("engine.offload=optimizer", "engine.offload=optimizer is not offered by fsdp2"),
        ("model.text.moe.top_k=9", "top_k"),
        ("mesh.dp_shard=3", "mesh.dp_shard=3"),
        ("mesh.ep=2", "mesh.ep=2"),
        ("data.sources.emoji.dataset.path=absent.parquet", "absent.parquet"),
        ("model.weights=absent", "absent"),
        (
            "+parameters.visoin={learning_rate: null, weight_decay: null, frozen: true}",
            "matches no parameter",
        ),
        ("checkpoint.resume=absent", "checkpoint.resume=absent"),
    ],
)
def test_bad_configuration_is_one_line_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert pretrain(tmp_path / "run", override) == 2
    assert words in refusal(capfd)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert pretrain(out, "train.max_steps=1") == 0
    before = (out / "config.yaml").read_text()
    assert pretrain(out, "train.max_steps=2", "model.text.moe.num_experts=8") == 2
    assert "is of another model" in refusal(capfd)
    assert (out / "config.yaml").read_text() == before


def image_text(folder: Path, images: list[bytes | None]) -> str:
    """A jsonl data set with an image file a line."""
    lines = []
    for number, content in enumerate(images):
        path = folder / f"{number}.png"
        if content is None:
            Image.new("RGB", (64, 64), (number * 5 % 255, 90, 30)).save(path)
        else:
            path.write_bytes(content)
        lines.append(json.dumps({"image": path.name, "text": f"square {number}"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")


def own_data(path: str, on_error: str = "skip", too_long: str = "drop") -> list[str]:
    dataset = (
        f"{{_target_: cantata.data.sources.ImageTextFile, path: {path}, split: all, held_out_share: 0.0}}"
    )
    policy = f"on_error: {on_error}, too_long: {too_long}, max_skipped: null, augment: null"
    source = f"{{weight: 1.0, {policy}, dataset: {dataset}}}"
    return ["~data.sources.emoji", "~data.sources.plays", f"+data.sources.own={source}", "data.streams=1"]


def test_a_corrupt_image_is_skipped_and_counted(tmp_path: Path) -> None:
    path = image_text(tmp_path, [None, b"no image at all", None, None])
    assert pretrain(tmp_path / "run", *own_data(path), "train.max_steps=2") == 0
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "left out sample own:1" in log
    assert re.search(r"left out \d+ training samples of own: \d+ corrupt image", log)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["loader"]["0"]["dropped"]["own"]


def test_the_readme_command_for_own_images_trains(tmp_path: Path) -> None:
    path = image_text(tmp_path, [None] * 8)
    overrides = ("data=image_text", f"data.sources.image_text.dataset.path={path}")
    assert pretrain(tmp_path / "run", *overrides, "data.num_workers=0", "train.max_steps=1") == 0
    assert metrics(tmp_path / "run")


def test_a_corrupt_image_ends_the_run_where_the_source_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = image_text(tmp_path, [None, b"no image at all", None])
    assert pretrain(tmp_path / "run", *own_data(path, on_error="raise"), "train.max_steps=2") == 1
    assert "own:1" in refusal(capfd)


def test_a_sample_longer_than_the_context_is_dropped_or_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": "short " * 30}), json.dumps({"text": "very " * 600})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "data.jsonl")
    assert pretrain(tmp_path / "drop", *own_data(path), "train.max_steps=1") == 0
    assert pretrain(tmp_path / "raise", *own_data(path, too_long="raise"), "train.max_steps=1") == 1
    assert "own:1" in refusal(capfd)
    assert metrics(tmp_path / "drop")
