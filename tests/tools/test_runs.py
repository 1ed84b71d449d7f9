"""Runs whose configuration lacks what their checkpoints need."""

from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core.config import read_config, save_config
from cantata.core.errors import ConfigError
from cantata.tools.runs import open_run
from tests.tools.test_export_adapter import make_run


@pytest.mark.parametrize("seed", [None, "many", True])
def test_a_run_of_an_adapter_needs_its_seed(tmp_path: Path, seed: object) -> None:
    make_run(tmp_path / "run", None)
    file = tmp_path / "run" / "config.yaml"
    config = read_config(file)
    assert open_run(tmp_path / "run").base(None)
    del config["seed"]
    save_config(config if seed is None else config | {"seed": seed}, file)
    with pytest.raises(ConfigError, match=r"config\.yaml has no seed") as error:
        open_run(tmp_path / "run")
    assert str(file) in str(error.value)
