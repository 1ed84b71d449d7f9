"""What is checked before a fine-tuning run touches anything; the runs themselves are in tests/recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.infer.fine_tune import fine_tune
from cantata.train.stage import FineTuneStage, LoRAStage

KINDS = ("sft", "lora")
AIMV2 = ("model=aimv2_mini", "collator=aimv2_mini", "model.weights=null")
PAIRS = ("model=aimv2_mini_lit", "collator=aimv2_pairs_mini", "model.weights=null")


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("sft", (), r"model\.weights must be given"),
        ("sft", ("model.weights=null", "mesh.ep=2"), r"mesh\.ep=2"),
        ("lora", ("model.weights=null", "lora.targets=[nothing]"), "'nothing' matches no linear layer"),
        ("lora", ("model.weights=null", "collator.processor.patch_size=16"), "patch_size"),
        *((kind, AIMV2, "Aimv2Pretraining learns patches or pairs, .* cantata pretrain") for kind in KINDS),
        *((kind, PAIRS, "Aimv2Contrastive learns patches or pairs, .* cantata pretrain") for kind in KINDS),
    ],
)
def test_what_cannot_be_run_ends_before_anything_is_written(
    tmp_path: Path, kind: str, overrides: tuple[str, ...], message: str
) -> None:
    schema = LoRAStage if kind == "lora" else FineTuneStage
    experiment = f"experiment=emoji_{kind}"
    node, origins = compose(kind, [experiment, f"out={tmp_path / 'run'}", *overrides])
    with pytest.raises(ConfigError, match=message):
        fine_tune(load(node, schema, origins), kind, {})
    assert not (tmp_path / "run").exists()
