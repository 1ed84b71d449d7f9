from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.assembly import build_held_out, build_loader
from cantata.data.collate import PackedCollator
from cantata.data.config import DataConfig, OnError, SourceConfig, TooLong, WeightUnit
from tests.data.helpers import assert_same, mini_processor


def emoji(split: str, **changes: Any) -> SourceConfig:
    node = {
        "_target_": "cantata.data.sources.CaptionedImages",
        "path": "embedded:twemoji.parquet",
        "image_column": "image",
        "caption": "{name}",
        "split": split,
        "held_out_share": 0.05,
    }
    policy: dict[str, Any] = {"on_error": OnError.skip, "too_long": TooLong.drop, "max_skipped": None}
    return SourceConfig(weight=1.0, **policy, augment=None, dataset=node | changes)


def config(**changes: Any) -> DataConfig:
    return DataConfig(
        num_workers=0,
        prefetch=2,
        stall_warning=None,
        streams=2,
        window=8,
        weight_unit=WeightUnit.samples,
        cache=None,
        sources={"emoji": emoji("train", **changes)},
        held_out={"emoji": emoji("held_out")},
    )


def test_training_and_held_out_batches_from_the_config() -> None:
    collator = PackedCollator(mini_processor())
    layout = {"sequence_length": 256, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    loader = build_loader(config(), collator, seed=1, **layout)
    [batch] = islice(iter(loader), 1)
    assert batch.input_ids_T.shape == (512,)
    assert batch.num_tokens > 450
    held_out = build_held_out(config(), collator, **layout)
    assert 60 < len(held_out) < 140
    assert sum(len(one.samples.lengths) for one in held_out) == len(held_out)


def test_a_missing_file_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.emoji\.dataset: .*gone\.parquet"):
        build_loader(
            config(path=str(tmp_path / "gone.parquet")),
            PackedCollator(mini_processor()),
            seed=1,
            sequence_length=256,
            micro_batch_size=2,
            rank=0,
            world_size=1,
        )


JITTER = {
    "_target_": "cantata.data.augment.CropFlipJitter",
    "min_area": 0.5,
    "max_stretch": 1.2,
    "flip": 0.5,
    "brightness": 0.1,
    "contrast": 0.1,
    "saturation": 0.1,
    "hue": 0.0,
}
LAYOUT = {"sequence_length": 256, "micro_batch_size": 2, "rank": 0, "world_size": 1}


def test_an_augmented_source_trains_on_other_pixels_and_the_same_tokens() -> None:
    collator = PackedCollator(mini_processor())
    plain = config()
    changed = replace(plain, sources={"emoji": replace(plain.sources["emoji"], augment=JITTER)})
    [left], [right] = (islice(iter(build_loader(c, collator, seed=1, **LAYOUT)), 1) for c in (plain, changed))
    assert left.rows == right.rows
    assert left.input_ids_T.equal(right.input_ids_T)
    assert not left.images.patches_PC.equal(right.images.patches_PC)


def test_a_bad_augment_names_its_key() -> None:
    plain = config()
    bad = replace(plain, sources={"emoji": replace(plain.sources["emoji"], augment=JITTER | {"flip": 2.0})})
    with pytest.raises(ConfigError, match=r"data\.sources\.emoji\.augment: .*flip"):
        build_loader(bad, PackedCollator(mini_processor()), seed=1, **LAYOUT)


@pytest.mark.parametrize("unit", [WeightUnit.samples, WeightUnit.tokens])
def test_weights_count_what_they_are_said_to(unit: WeightUnit) -> None:
    """Plays have about eleven times the tokens of an emoji here."""
    plays = {
        "_target_": "cantata.data.sources.TextDocuments",
        "path": "embedded:tinyshakespeare.txt",
        "document_bytes": 600,
        "split": "train",
        "held_out_share": 0.05,
    }
    sources = {"emoji": emoji("train"), "plays": replace(emoji("train"), dataset=plays)}
    loader = build_loader(
        replace(config(), sources=sources, weight_unit=unit),
        PackedCollator(mini_processor()),
        seed=1,
        **LAYOUT,
    )
    samples, tokens = Counter(), Counter()
    for batch in islice(iter(loader), 150 if unit is WeightUnit.tokens else 60):
        names = [name.partition(":")[0] for row in batch.rows for name in row.samples]
        samples.update(names)
        for name, length in zip(names, batch.samples.lengths, strict=True):
            tokens[name] += length
    counted = tokens if unit is WeightUnit.tokens else samples
    other = samples if unit is WeightUnit.tokens else tokens
    assert counted["emoji"] / counted.total() == pytest.approx(0.5, abs=0.05)
    assert abs(other["emoji"] / other.total() - 0.5) > 0.2


def test_a_cache_serves_training_and_held_out_samples_but_no_augmented_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = PackedCollator(mini_processor())
    cached = replace(config(), cache=str(tmp_path))
    [made] = islice(iter(build_loader(cached, collator, seed=1, **LAYOUT)), 1)
    first = list(build_held_out(cached, collator, **LAYOUT))
    entries = len(list(tmp_path.rglob("*.npz")))
    assert entries > 90
    changed = replace(cached, sources={"emoji": replace(cached.sources["emoji"], augment=JITTER)})
    list(islice(iter(build_loader(changed, collator, seed=1, **LAYOUT)), 1))
    assert len(list(tmp_path.rglob("*.npz"))) == entries

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(PackedCollator, "encode", refuse)
    again = build_loader(cached, collator, seed=1, **LAYOUT)
    assert_same(next(iter(again)), made)
    for left, right in zip(build_held_out(cached, collator, **LAYOUT), first, strict=True):
        assert_same(left, right)
