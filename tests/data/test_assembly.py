from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.assembly import build_held_out, build_loader
from cantata.data.collate import PackedCollator
from cantata.data.config import DataConfig, OnError, SourceConfig, TooLong
from tests.data.helpers import mini_processor


def emoji(split: str, **changes: Any) -> SourceConfig:
    node = {
        "_target_": "cantata.data.sources.CaptionedImages",
        "path": "embedded:twemoji.parquet",
        "image_column": "image",
        "caption": "{name}",
        "split": split,
        "held_out_share": 0.05,
    }
    return SourceConfig(1.0, OnError.skip, TooLong.drop, node | changes)


def config(**changes: Any) -> DataConfig:
    sources = {"emoji": emoji("train", **changes)}
    return DataConfig(0, 2, 2, 8, sources, {"emoji": emoji("held_out")})


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
