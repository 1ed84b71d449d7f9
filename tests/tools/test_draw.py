"""Where drawn images go; drawing itself is tested in `tests/recipes/test_emu3.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.infer.sampling import SamplingConfig
from cantata.tools.draw import _files, draw

CONFIG = SamplingConfig(
    max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=(), seed=0
)


def test_one_image_has_the_name_and_several_have_numbers() -> None:
    assert _files(Path("a/x.png"), 1) == [Path("a/x.png")]
    assert _files(Path("a/x.y.png"), 3) == [Path(f"a/x.y-{number}.png") for number in (1, 2, 3)]


def test_files_and_the_tokenizer_come_before_any_weights(tmp_path: Path) -> None:
    given = argparse.Namespace(out=tmp_path / "x.png", tokenizer=None, model=tmp_path / "none")
    with pytest.raises(ConfigError, match="add --tokenizer DIR"):
        draw(given, ["a"], CONFIG)
    (tmp_path / "x-2.png").touch()
    with pytest.raises(ConfigError, match=r"x-2.png exists already"):
        draw(given, ["a", "b"], CONFIG)


@pytest.mark.parametrize("name", ["x", "x.bad", "x.mp4"])
def test_a_name_that_no_picture_is_written_to_is_found_first(tmp_path: Path, name: str) -> None:
    given = argparse.Namespace(out=tmp_path / name, tokenizer=tmp_path, model=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"write \*\.png"):
        draw(given, ["a"], CONFIG)
