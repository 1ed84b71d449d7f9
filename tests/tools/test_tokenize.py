"""Turning images into codes in batches: a folder stays of one kind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.tools import tokenize


def test_shards_cover_a_source_once(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(out=tmp_path, shard_size=4)
    shards = tokenize._shards(config, "a", 10)
    assert [index for shard in shards for index in shard.indices] == list(range(10))
    assert [shard.path.name for shard in shards] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert not tokenize._shards(config, "a", 0)


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    out = tmp_path / "codes"
    tokenize._claim(out, {"tokenizer": "a", "sizes": [[8, 8]]})
    tokenize._claim(out, {"tokenizer": "a", "sizes": [[8, 8]]})
    assert json.loads((out / "codes.json").read_text()) == {"tokenizer": "a", "sizes": [[8, 8]]}
    with pytest.raises(ConfigError, match="holds codes of another sizes, tokenizer; choose another folder"):
        tokenize._claim(out, {"tokenizer": "b", "sizes": [[8, 16]]})


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out=.*file/codes cannot be written"):
        tokenize._claim(tmp_path / "file" / "codes", {})


@pytest.mark.parametrize("key", ["batch_size", "shard_size"])
def test_sizes_must_be_positive(key: str) -> None:
    given: dict[str, Any] = dict.fromkeys(("name", "out", "tokenizer", "data", "collator"))
    with pytest.raises(ConfigError, match=f"{key}=0 must be at least 1"):
        tokenize.TokenizeConfig(**given, **({"batch_size": 1, "shard_size": 1} | {key: 0}))
    assert torch.is_grad_enabled()
