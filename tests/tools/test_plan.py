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
        "logits": int,
        "all_to_all": int,
        "packed": int,
        "total": int,
    },
    "all_to_all": {"rows": int, "bytes": int, "buffer_bytes": int, "per_step": int, "bytes_per_step": int},
    "flops_per_step": float,
    "flops_per_step_per_rank": float,
    "gpu": str,
    "mfu": float,
    "step_seconds": float,
    "hours": float,
    "gpu_hours": float,
    "tokens_per_second_per_gpu": float,
    "memory_gib": float,
    "fits": bool,
    "notes": list,
}


def shape_of(value: Any) -> Any:
    return {key: shape_of(item) for key, item in value.items()} if isinstance(value, dict) else type(value)


def test_json_has_stable_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "pretrain", *SMALL, "--json", *RANKS, "cluster.gpu=h100", "cluster.memory_gib=0.5"])
        == 0
    )
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
            ("pretrain", "cluster.gups=8"),
            "override 'cluster.gups=8': cluster.gups is not a known key; nearest: cluster.gpus",
        ),
        (("pretrain", "cluster.gpu=h1000"), "cluster.gpu=h1000 is no GPU that is known; nearest: h100"),
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
        (("pretrain", "--find"), "--find needs cluster.gpu, the name of a GPU, such as cluster.gpu=h100"),
        (("pretrain", "--find", "--batches", "2"), "--find tries micro-batches of many sizes"),
        (("pretrain", "--batches", "-1"), "--batches -1 must be at least 0"),
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


HOURS = ("step_seconds", "hours", "gpu_hours", "tokens_per_second_per_gpu")


def test_a_named_gpu_says_how_long_and_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "pretrain", *SMALL, *RANKS, "cluster.gpu=l40s", "train.max_steps=1000"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "s a step at MFU 0.4" in shown
    assert "on each l40s; 1,000 steps:" in shown
    assert "fits into 48 GiB" in shown
    assert main(["plan", "pretrain", *SMALL, *RANKS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in (*HOURS, "gpu", "memory_gib")] == [None] * 6


def test_the_data_are_read_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for batches in ("0", "2"):
        assert main(["plan", "pretrain", *SMALL, "cluster.gpu=cpu", "--json", "--batches", batches]) == 0
        counts.append(json.loads(capsys.readouterr().out)["micro_batch"]["images"])
    assert counts[0] == 8
    assert counts[1] not in (0, 8)
    assert main(["plan", "pretrain", "experiment=aria_25b_stage1", "--batches", "2"]) == 2
    assert "data.sources.text.dataset.path" in capsys.readouterr().err


FOUND = {
    "name": str,
    "ranks": int,
    "gpu": str,
    "mfu": float,
    "memory_gib": float,
    "headroom": float,
    "link_bytes_per_second": float,
    "candidates": int,
    "found": list,
    "smallest": {
        "micro_batch_size": int,
        "gradient_accumulation_steps": int,
        "ep": int,
        "recompute": str,
        "memory": SHAPE["memory"],
        "step_seconds": float,
        "overrides": list,
    },
}


def test_ways_that_fit_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ("cluster.gpu=h100", "cluster.memory_gib=10.0", "cluster.gpus=2")
    assert main(["plan", "pretrain", *SMALL, *cluster, "--find", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert shape_of(found) == FOUND
    assert [shape_of(one) for one in found["found"]] == [FOUND["smallest"]] * len(found["found"])
    assert main(["plan", "pretrain", *SMALL, *cluster, "--find"]) == 0
    shown = capsys.readouterr().out
    assert "cantata plan pretrain --find: pretrain" in shown
    assert " ".join(found["found"][0]["overrides"]) in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 88


def test_where_nothing_fits_the_least_is_said_and_what_else_helps(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ("cluster.gpu=h100", "cluster.memory_gib=0.001")
    assert main(["plan", "pretrain", *SMALL, *cluster, "--find"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "nothing fits into 90% of 0.001 GiB; the least that was found:" in shown
    assert "more ranks (cluster.gpus)" in shown


@pytest.mark.slow
def test_a_large_plan_takes_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lora", "experiment=aria_25b_lora", "mesh.ep=8", "cluster.gpus=64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["trained"] < 0.01 * found["parameters"]["total"]
    # In forward, in recomputation and in backward, there and back, in 28 layers of 2 micro-batches.
    assert found["all_to_all"]["per_step"] == 3 * 2 * 28 * 2
