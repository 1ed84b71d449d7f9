"""Which family reads a folder, by what its `config.json` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cantata.core.errors import ConfigError
from cantata.tools.families import ARIA, EMU3, MLLAMA, Family, family_of

KINDS = {
    "aria": ARIA,
    "emu3": EMU3,
    "emu3_text_model": EMU3,
    "mllama": MLLAMA,
    "mllama_text_model": MLLAMA,
}


@pytest.mark.parametrize(("kind", "family"), KINDS.items())
def test_a_folder_is_read_by_its_family(tmp_path: Path, kind: str, family: Family) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert family_of(tmp_path) is family


@pytest.mark.parametrize("config", [{"model_type": "cantata_autoencoder"}, {"model_type": "llama"}, {}])
def test_others_are_refused_by_name(tmp_path: Path, config: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = rf"config.json has model_type={config.get('model_type')!r}; language models are aria, "
    with pytest.raises(ConfigError, match=message):
        family_of(tmp_path)
