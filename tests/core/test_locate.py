from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.core.locate import asset, configs_dir, recipes_dir


def test_the_shipped_folders_are_found() -> None:
    assert (configs_dir() / "pretrain.yaml").is_file()
    assert (recipes_dir() / "pretrain.py").is_file()


def test_an_embedded_name_is_a_file_of_the_package() -> None:
    assert asset("embedded:tokenizer.json").is_file()


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert asset(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["embedded:tokeniser.json", "embedded:", "no/such/file.parquet"])
def test_what_is_not_there_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        asset(path)


def test_a_misspelt_asset_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"nearest: tokenizer\.json"):
        asset("embedded:tokeniser.json")
