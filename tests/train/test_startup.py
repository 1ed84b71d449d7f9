"""The start-up report says everything it was told, in 88 columns."""

from pathlib import Path

import pytest

from cantata.train import startup
from cantata.train.memory import MemoryEstimate
from cantata.train.startup import GroupRow, SourceRow
from cantata.train.traffic import Traffic
from tests.train.samples import report


def test_everything_is_said(tmp_path: Path) -> None:
    text = startup.as_text(report(Path("outputs/aria_mini")))
    for part in (
        "cantata pretrain: aria_mini",
        "outputs/aria_mini (resumed from step-00000100)",
        "2 ranks on cpu (dp_shard 2); torch 2.13.0",
        "fsdp2, bf16, states fp32, offload none",
        "8,192 tokens (4 rows x 512 tokens x 2 micro-batches x 2 ranks), 152 GFLOP",
        "3,000 steps, 24.6M tokens",
        "5 layers, 4 of 16 per token: 3.10M of 8.47M parameters active (37%)",
        "total: 7.66M trained, 813k frozen",
        "tensorboard --logdir",
    ):
        assert part in text
    rows = {line.split("  ")[2]: line.split() for line in text.splitlines() if line.startswith("    ")}
    assert rows["projector.*"][-3:] == ["310k", "0.001", "0.1"]
    assert rows["frozen"][-3:] == ["813k", "frozen", "-"]
    assert rows["emoji"][-2:] == ["1,716", "70.0%"]
    assert rows["shakespeare"][-2:] == ["unknown", "30.0%"]
    assert rows["emoji (held out)"][-3:] == ["190", "held", "out"]
    assert rows["activations"][-3:] == ["312", "MiB", "68%"]
    assert rows["total"][-2:] == ["457", "MiB"]


@pytest.mark.parametrize("name", ["default", "text.layers.[0-9]*.mlp", "x" * 120])
def test_lines_keep_their_width_and_names_are_never_read_as_markup(name: str) -> None:
    text = startup.as_text(
        report(
            Path("outputs") / name, groups=[GroupRow(name, 10, 1e-3, 0.1)], sources=[SourceRow(name, 1, 1.0)]
        )
    )
    assert max(len(line) for line in text.splitlines()) <= startup.WIDTH
    assert "".join(text.split()).count(name) == (3 if len(name) < 60 else 1)
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_spread_experts_say_what_travels() -> None:
    traffic = Traffic(rows=8192, bytes_each=5 << 20, buffer_bytes=20 << 20, per_step=160)
    text = startup.as_text(report(Path("out"), mesh={"dp_shard": 4, "ep": 2}, world_size=4, traffic=traffic))
    assert "4 ranks on cpu (dp_shard 4, ep 2)" in text
    said = " ".join(text.split())
    assert "5 MiB leave a rank in one all-to-all if routing is balanced, 160 times a step: 800 MiB" in said


def test_what_is_not_known_is_left_out() -> None:
    text = startup.as_text(
        report(
            Path("out"),
            world_size=1,
            mesh={"dp_shard": 1},
            experts=None,
            memory=None,
            flops_per_step=None,
            sources=[],
            gradient_accumulation_steps=1,
            notes=(),
        )
    )
    assert "1 rank on cpu; torch" in text
    assert "2,048 tokens (4 rows x 512 tokens); 3,000 steps" in text
    assert "experts" not in text
    assert "exchange" not in text
    assert "memory" not in text
    assert "FLOP" not in text


def test_it_is_kept_in_the_run_directory(tmp_path: Path) -> None:
    told = report(tmp_path)
    assert startup.write(told) == tmp_path / "logs" / "startup.txt"
    assert (tmp_path / "logs" / "startup.txt").read_text() == startup.as_text(told)


def test_memory_parts_add_up() -> None:
    assert MemoryEstimate(1, 2, 3, 4, 5).total == 15
