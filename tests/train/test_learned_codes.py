"""A run goes on with the codes that it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.data.code_origin import CodeOrigin
from cantata.train.learned_codes import KEPT, LearnedCodes, learned_codes
from cantata.train.stage import PretrainStage
from cantata.train.tokenizer_stage import TokenizerStage
from tests.recipes.runner import TINY, TINY_VQ


def coded(folder: Path, tokenizer: str) -> Path:
    folder.mkdir()
    (folder / "codes.json").write_text(json.dumps({"tokenizer": tokenizer, "sizes": [[16, 16]]}))
    return folder


def stage_of(draw: Path, name: Path, *overrides: str) -> PretrainStage:
    paths = [f"data.{part}.draw.dataset.path={draw}" for part in ("sources", "held_out")]
    paths += [f"data.{part}.name.dataset.path={name}" for part in ("sources", "held_out")]
    composed = compose("pretrain", ["experiment=emu3_mini", *paths, *overrides])
    return load(composed.node, PretrainStage, composed.origins)


def test_the_state_comes_back_and_another_tokenizers_is_refused() -> None:
    kept = LearnedCodes(CodeOrigin("one", [[16, 16]]))
    state = json.loads(json.dumps(kept.state_dict()))
    kept.load_state_dict(state)
    kept.load_state_dict(state | {"sizes": [[8, 8]]})
    with pytest.raises(ConfigError, match=r"codes of data\.sources are .* than those of the checkpoint"):
        kept.load_state_dict(state | {"tokenizer": "two"})


def test_codes_of_all_sources_and_of_held_out_ones(tmp_path: Path) -> None:
    one, two = coded(tmp_path / "one", "1"), coded(tmp_path / "two", "2")
    found = learned_codes(stage_of(one, one))
    assert found.keys() == {KEPT}
    assert found[KEPT].state_dict() == {"tokenizer": "1", "sizes": [[16, 16]]}
    with pytest.raises(ConfigError, match=r"codes of data\.sources\.name are another tokenizer's"):
        learned_codes(stage_of(one, two))
    held_out = f"data.held_out.draw.dataset.path={two}"
    with pytest.raises(ConfigError, match=r"codes of data\.held_out\.draw are another tokenizer's"):
        learned_codes(stage_of(one, one, held_out))


def test_weights_that_learned_another_tokenizers_codes(tmp_path: Path) -> None:
    one, weights = coded(tmp_path / "one", "1"), tmp_path / "hub"
    weights.mkdir()
    stage = stage_of(one, one, f"model.weights={weights}")
    assert learned_codes(stage), "a folder that does not say"
    CodeOrigin("1", [[8, 8]]).write(weights)
    assert learned_codes(stage)
    CodeOrigin("2", [[16, 16]]).write(weights)
    with pytest.raises(ConfigError, match=r"than those of model\.weights="):
        learned_codes(stage)


def test_runs_without_codes_keep_nothing() -> None:
    composed = compose("pretrain", [*TINY])
    assert learned_codes(load(composed.node, PretrainStage, composed.origins)) == {}
    composed = compose("vq", [*TINY_VQ])
    assert learned_codes(load(composed.node, TokenizerStage, composed.origins)) == {}
