"""Encoders from runs, checkpoints and folders: the weights that lie there, frozen, and images read alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cantata import cli
from cantata.core.errors import ConfigError
from cantata.models.aimv2 import Aimv2PairProcessor, Aimv2VisionConfig
from cantata.models.hub import save_to_hub
from cantata.tools.open_encoder import OpenedEncoder, open_encoder
from tests.models.aimv2.small import NATIVE, VISION, contrastive, encoder, pair_processor, picture
from tests.recipes.test_aimv2 import TINY_AIMV2, TINY_LIT
from tests.tools.test_export import make_run

CPU = torch.device("cpu")


def assert_frozen(found: OpenedEncoder) -> None:
    assert not found.tower.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in found.tower.parameters())


@pytest.mark.parametrize("vision", [VISION, NATIVE], ids=["fixed", "native"])
def test_a_folder_of_an_encoder(vision: Aimv2VisionConfig, tmp_path: Path) -> None:
    model = encoder(vision)
    save_to_hub(model, model.hub_layout(), tmp_path / "hub", 10**9)
    found = open_encoder(tmp_path / "hub", CPU)
    assert_frozen(found)
    assert (found.vision, found.pairs) == (vision, None)
    expected = model.vision.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.tower.state_dict().items())
    patches = found.reader.patches(picture(0, 40, 20))
    # A native image keeps its size, a square is cropped to the size that the encoder knows.
    assert len(patches.patches_PC) == (10 * 5 if vision.is_native else 16)


def test_a_run_and_what_is_exported_of_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", tiny=TINY_AIMV2)
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "hub")]) == 0
    run, hub = (open_encoder(tmp_path / name, CPU) for name in ("run", "hub"))
    assert_frozen(run)
    other = hub.tower.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in run.tower.state_dict().items())
    one, same = (opened.reader.patches(picture(1, 50, 70)) for opened in (run, hub))
    assert np.array_equal(one.patches_PC, same.patches_PC)
    assert np.array_equal(one.position_ids_P, same.position_ids_P)


def test_a_contrastive_run_and_what_is_exported_of_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", tiny=TINY_LIT)
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "hub")]) == 0
    texts = []
    for name in ("run", "hub"):
        found = open_encoder(tmp_path / name, CPU)
        assert found.pairs is not None
        assert found.pairs.vision is found.tower
        assert isinstance(found.reader, Aimv2PairProcessor)
        texts.append(found.reader.text_ids("a red circle"))
    assert texts[0] == texts[1]


def contrastive_folder(folder: Path) -> Path:
    model = contrastive()
    save_to_hub(model, model.hub_layout(), folder, 10**9)
    return folder


def test_a_contrastive_folder_reads_texts_where_it_has_a_tokenizer(tmp_path: Path) -> None:
    folder = contrastive_folder(tmp_path / "hub")
    alone = open_encoder(folder, CPU)
    assert alone.pairs is not None
    assert not isinstance(alone.reader, Aimv2PairProcessor)
    contrastive().hub_layout().write_processor(pair_processor(), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    # Tokens may be spelt as mappings, as transformers also writes them.
    path.write_text(json.dumps(config | {"bos_token": {"content": config["bos_token"]}}))
    reader = open_encoder(folder, CPU).reader
    assert isinstance(reader, Aimv2PairProcessor)
    assert reader.text_ids("a red circle") == pair_processor().text_ids("a red circle")
    path.write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json names no eos_token"):
        open_encoder(folder, CPU)


def test_what_holds_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; give a run of AIMv2 or a folder with config"):
        open_encoder(tmp_path / "gone", CPU)
    with pytest.raises(ConfigError, match="neither a complete checkpoint nor a run directory"):
        open_encoder(tmp_path, CPU)
    make_run(tmp_path / "aria")
    with pytest.raises(ConfigError, match="Aria has no image encoder; give a run of AIMv2"):
        open_encoder(tmp_path / "aria", CPU)
