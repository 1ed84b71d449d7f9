"""From a composed config to a model, its data and its first values."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.models.aria import Aria
from cantata.models.hub import HubReader, save_to_hub
from cantata.models.protocol import LanguageModel
from cantata.parallel.materialize import RandomInit
from cantata.train.stage import (
    FineTuneStage,
    PretrainStage,
    build_data,
    build_model,
    initial_values,
    require_weights,
)

TINY = (
    *("data.num_workers=0", "model.text.vocab_size=6144", "model.text.moe.num_experts=4"),
    "model.text.moe.balance.aux_loss_groups=4",
    *("model.text.num_hidden_layers=2", "model.vision.num_hidden_layers=1", "model.text.hidden_size=32"),
)


@functools.cache
def stage(*overrides: str) -> PretrainStage:
    """`pretrain` with a model of few parameters."""
    node, origins = compose("pretrain", (*TINY, *overrides))
    return load(node, PretrainStage, origins)


def test_the_model_has_shapes_and_no_storage() -> None:
    model = build_model(stage())
    assert isinstance(model, LanguageModel)
    assert len(model.moe_layers()) == 2
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not torch.empty(0).is_meta


def test_from_scratch_the_seed_decides() -> None:
    model = build_model(stage())
    name, index = "text.layers.0.self_attn.q_proj.weight", (slice(0, 4), slice(0, 4))
    sources = [initial_values(stage(f"seed={seed}"), model) for seed in (1, 1, 2)]
    assert all(isinstance(source, RandomInit) for source in sources)
    first, again, other = (source.read(name, index) for source in sources)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_are_read_from_the_published_checkpoint(tmp_path: Path) -> None:
    published = build_model(stage()).to_empty(device="cpu")
    assert isinstance(published, Aria)
    for value, parameter in enumerate(published.parameters()):
        parameter.data.fill_(value)
    save_to_hub(published, published.hub_layout(), tmp_path / "hub", max_shard_bytes=10**9)
    source = initial_values(stage(f"model.weights={tmp_path / 'hub'}"), build_model(stage()))
    assert isinstance(source, HubReader)
    for name, parameter in published.named_parameters():
        assert torch.equal(source.read(name), parameter), name


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}.*give a Hugging Face model directory"):
        initial_values(stage(f"model.weights={tmp_path}"), build_model(stage()))


def test_each_rank_reads_batches_of_the_shape_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = stage("train.micro_batch_size=2", "train.sequence_length=256")
    batches = []
    for rank in range(2):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        loader, held_out = build_data(chosen, build_model(chosen))
        batches.append(loader.peek())
        assert set(held_out.sizes()) == {"emoji", "plays"}
    assert [batch.input_ids_T.numel() for batch in batches] == [512, 512]
    names = [{name for row in batch.rows for name in row.samples} for batch in batches]
    assert names[0]
    assert not names[0] & names[1]


def fine_tune(*overrides: str) -> FineTuneStage:
    node, origins = compose("sft", (*TINY, *overrides))
    return load(node, FineTuneStage, origins)


def test_fine_tuning_asks_for_weights_unless_null_is_said() -> None:
    with pytest.raises(ConfigError, match=r"model\.weights must be given.*null starts from random values"):
        require_weights(fine_tune())
    require_weights(fine_tune("model.weights=null"))
    require_weights(fine_tune("model.weights=DIR"))


def test_goals_are_named_by_their_keys_and_need_evaluations() -> None:
    best = "checkpoint.best={metric: eval/accuracy, mode: max}"
    stop = "train.early_stopping={metric: eval/loss, mode: min, patience: 2, min_delta: 0.0}"
    assert stage().goals() == {}
    assert stage(best, stop).goals() == {
        "checkpoint.best.metric": "eval/accuracy",
        "train.early_stopping.metric": "eval/loss",
    }
    for key, override in (("checkpoint.best", best), ("train.early_stopping", stop)):
        with pytest.raises(ConfigError, match=rf"{key}\.metric needs evaluations"):
            stage(override, "train.eval_every=0")


def test_choices_belong_to_held_out_sources() -> None:
    assert fine_tune("+accuracy.choices={emoji: [Flags, Objects]}").accuracy.choices["emoji"][0] == "Flags"
    with pytest.raises(ConfigError, match=r"accuracy\.choices\.emojis is no source .* nearest: emoji"):
        fine_tune("+accuracy.choices={emojis: [Flags, Objects]}")


def test_going_by_accuracy_needs_questions() -> None:
    best = "checkpoint.best={metric: eval/accuracy/emoji, mode: max}"
    node, origins = compose("sft", ["experiment=emoji_sft", best, "accuracy.samples=0"])
    with pytest.raises(ConfigError, match=r"checkpoint.best.metric=eval/accuracy/emoji needs questions"):
        load(node, FineTuneStage, origins)
