"""`cantata plan` as a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cantata.cli import main
from cantata.tools.plan import STAND_IN, read_stage
from tests.train.test_stage import TINY

SMALL = (*TINY, "train.micro_batch_size=1", "train.sequence_length=256")
RANKS = ("cluster.gpus=4", "mesh.ep=2")

SHAPE = {
    "stage": str,
    "name": str,
    "ranks": int,
    "mesh": {"dp_replicate": int, "dp_shard": int, "ep": int, "efsdp": int},
    "engine": {"_target_": str, "precision": str, "state_dtype": str, "offload": str},
    "recompute": str,
    "tokens_per_step": int,
    "micro_batch": {"tokens": int, "images": int, "patches": int, "per_step": int},
    "parameters": {"total": int, "trained": int, "frozen": int, "active": int, "groups": list},
    "memory": {
        "parameters": int,
        "gradients": int,
        "optimizer": int,
        "gathered": int,
        "activations": int,
        "total": int,
    },
    "all_to_all": {"rows": int, "bytes": int, "buffer_bytes": int, "per_step": int, "bytes_per_step": int},
    "flops_per_step": float,
    "flops_per_step_per_rank": float,
    "memory_gib": float,
    "fits": bool,
    "notes": list,
}


def shape_of(value: Any) -> Any:
    return {key: shape_of(item) for key, item in value.items()} if isinstance(value, dict) else type(value)


def test_json_has_stable_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pretrain", *SMALL, "--json", *RANKS, "cluster.memory_gib=0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert shape_of(found) == SHAPE
    assert found["mesh"] == {"dp_replicate": 1, "dp_shard": 4, "ep": 2, "efsdp": 2}
    assert found["fits"] == (found["memory"]["total"] <= 0.5 * 2**30)
    assert found["tokens_per_step"] == 4 * 256
    assert found["flops_per_step_per_rank"] == found["flops_per_step"] / 4
    assert found["parameters"]["trained"] + found["parameters"]["frozen"] == found["parameters"]["total"]
    assert {"name", "tensors", "parameters", "learning_rate", "weight_decay"} == set(
        found["parameters"]["groups"][0]
    )


def test_people_read_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pretrain", *SMALL, *RANKS, "cluster.memory_gib=1e-3", "name=trial"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "cantata plan pretrain: trial",
        "4 ranks (dp_shard 4, ep 2, efsdp 2)",
        "FSDP2Engine, precision bf16, state_dtype fp32, offload none",
        "1 micro-batch of 256 tokens, 8 images, 512 patches",
        "leave a rank in one all-to-all",
        "does not fit into 0.001 GiB",
        "activations",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 88


def test_one_rank_exchanges_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pretrain", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["all_to_all"], found["fits"], found["memory_gib"]) == (None, None, None)


def test_what_the_user_has_need_not_be_there() -> None:
    stage = read_stage("pretrain", ["experiment=aria_25b_stage2"], None)
    assert stage.collator["processor"]["tokenizer"] == STAND_IN
    assert stage.model["weights"] == STAND_IN
    assert all(source.dataset["path"] == STAND_IN for source in stage.data.held_out.values())


def test_overlays_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\ncluster: {gpus: 16}\n")
    stage = read_stage("pretrain", ["experiment=mine"], tmp_path)
    assert (stage.seed, stage.cluster.gpus) == (7, 16)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "cantata plan: the following arguments are required: STAGE\n"),
        (("pretrian",), "pretrian is no stage that can be planned; nearest: pretrain"),
        (("pretrain", "--jsn"), "cantata plan: unrecognized arguments: --jsn"),
        (
            ("pretrain", "cluster.gpu=8"),
            "override 'cluster.gpu=8': cluster.gpu is not a known key; nearest: cluster.gpus",
        ),
        (("pretrain", "cluster.gpus=none"), "override 'cluster.gpus=none': cluster.gpus must be an integer"),
        (("pretrain", "cluster.gpus=0"), "cluster.gpus=0 must be at least 1"),
        (("pretrain", "--config-dir", "nowhere"), "--config-dir nowhere is no folder"),
        (
            ("pretrain", "cluster.gpus=12", "mesh.ep=8"),
            "mesh.ep=8 must divide the 12 ranks of a copy (mesh.dp_shard)",
        ),
        (
            ("pretrain", "cluster.gpus=12", "mesh.ep=3"),
            "mesh.ep=3 must divide the number of experts (16)",
        ),
        (("pretrain", "seed=???"), "override 'seed=???': seed must be given"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {line}")
    assert shown.err.count("\n") == 1
