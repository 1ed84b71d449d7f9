"""Whose codes a model learned: over several datasets, and in folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.code_origin import CodeOrigin, origin_of, read_origin


def coded(folder: Path, tokenizer: str, *sizes: list[int]) -> dict[str, Any]:
    folder.mkdir()
    (folder / "codes.json").write_text(json.dumps({"tokenizer": tokenizer, "sizes": list(sizes)}))
    return {"_target_": "cantata.data.tokenized.TokenizedImages", "path": str(folder)}


def test_sizes_of_all_datasets_count_once(tmp_path: Path) -> None:
    a = coded(tmp_path / "a", "one", [16, 16], [8, 16])
    b = coded(tmp_path / "b", "one", [8, 16], [32, 8])
    text = {"_target_": "cantata.data.sources.TextLines", "path": "nowhere"}
    assert origin_of([("t", text)]) is None
    assert origin_of([("a", a), ("t", text), ("b", b)]) == CodeOrigin("one", [[16, 16], [8, 16], [32, 8]])


def test_two_tokenizers_are_refused(tmp_path: Path) -> None:
    a, b = coded(tmp_path / "a", "one", [16, 16]), coded(tmp_path / "b", "two", [16, 16])
    with pytest.raises(ConfigError, match=r"codes of b are another tokenizer's \(two\) than"):
        origin_of([("a", a), ("b", b)])


def test_a_folder_keeps_it(tmp_path: Path) -> None:
    assert read_origin(tmp_path) is None
    origin = CodeOrigin("one", [[16, 16]])
    origin.write(tmp_path)
    assert read_origin(tmp_path) == origin
    for text in ("{", "[]", '{"tokenizer": "one"}', '{"tokenizer": 1, "sizes": [], "more": 2}'):
        (tmp_path / "image_codes.json").write_text(text)
        with pytest.raises(ConfigError, match="does not name a tokenizer and its sizes"):
            read_origin(tmp_path)
