from __future__ import annotations

from pathlib import Path

import pytest

from cantata.core.compose import compose, one_line
from cantata.core.errors import ConfigError
from cantata.core.schema import InvalidKey, Key

FILES = {
    "stage.yaml": """
defaults:
  - engine: fast
  - _self_
  - experiment: null
name: run
out: outputs/${name}
steps: {max: 3, every: 1}
rules:
  "text.*": {rate: 1}
extras: {}
""",
    "engine/fast.yaml": "precision: bf16\nsizes: [1, 2]\n",
    "engine/slow.yaml": "precision: fp32\n",
    "experiment/mini.yaml": "# @package _global_\nsteps: {max: 4, evrey: 2}\n",
    "experiment/broken.yaml": "# @package _global_\nname: [1\nb: 2\n",
}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "key", "where"),
    [
        ([], ("steps", "max"), "{}/stage.yaml"),
        (["experiment=mini"], ("steps", "max"), "{}/experiment/mini.yaml"),
        (["experiment=mini"], ("steps", "every"), "{}/stage.yaml"),
        (["experiment=mini", "steps.max=5"], ("steps", "max"), "override 'steps.max=5'"),
        (["steps={max: 5}"], ("steps", "max"), "override 'steps={max: 5}'"),
        (["+extra.deep=1"], ("extra",), "override '+extra.deep=1'"),
        (["engine=slow"], ("engine", "precision"), "{}/engine/slow.yaml"),
        ([], ("engine", "sizes", 1), "{}/engine/fast.yaml"),
        ([], ("rules", "text.*", "rate"), "{}/stage.yaml"),
    ],
)
def test_a_key_is_found_where_it_was_set_last(
    configs: Path, overrides: list[str], key: Key, where: str
) -> None:
    origins = compose("stage", overrides, configs).origins
    assert origins.locate(InvalidKey(key, "is wrong")) == where.replace("{}", str(configs))


def test_a_missing_key_belongs_to_the_file_that_introduces_its_section(configs: Path) -> None:
    origins = compose("stage", ["experiment=mini", "steps.max=5"], configs).origins
    error = InvalidKey(("steps", "unit"), "is missing", holder=("steps",))
    assert origins.locate(error) == f"{configs}/stage.yaml"


def test_shipped_files_are_named_from_the_configs_folder() -> None:
    origins = compose("pretrain", ["experiment=aria_mini"]).origins
    assert origins.locate(InvalidKey(("name",), "is wrong")) == "configs/experiment/aria_mini.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=mni"], "^experiment=mni: no such option; nearest: mini$"),
        (["engine=zzz"], "^engine=zzz: no such option; known: fast, slow$"),
        (["setps.max=3"], "^override 'setps.max=3': setps.max is not a known key; nearest: steps.max$"),
        (["enigne=fast"], "^override 'enigne=fast': enigne is not a known key; nearest: engine$"),
        (["experiment=mini", "steps.mxa=3"], "override 'steps.mxa=3'.*nearest: steps.max$"),
        (["steps={mxa: 3}"], "^override 'steps={mxa: 3}': steps.mxa is not a known key; nearest: steps.max$"),
        (
            ["extras={a: 1}"],
            r"^override 'extras={a: 1}': extras is empty; to add to it, write '\+extras={a: 1}'$",
        ),
        (["steps.max=[1"], r"^override 'steps.max=\[1': "),
        (["~nothing"], "nothing"),
        (["experiment=broken"], "broken.yaml:3: not valid YAML"),
    ],
)
def test_refusals_are_one_line_and_say_what_was_meant(
    configs: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose("stage", overrides, configs)
    assert "\n" not in str(caught.value)


def test_an_unknown_stage_is_refused(configs: Path) -> None:
    with pytest.raises(ConfigError, match="staeg"):
        compose("staeg", [], configs)


def test_one_line_takes_the_first_that_says_something() -> None:
    assert one_line("\n  first\nsecond") == "first"
    assert one_line(KeyError()) == "KeyError"


def test_quoted_keys_are_named_as_the_cause() -> None:
    with pytest.raises(ConfigError, match=r"keys are written without quotes"):
        compose("pretrain", ['+parameters={"vision.*": {frozen: true}}'])
