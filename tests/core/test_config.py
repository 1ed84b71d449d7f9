from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from cantata.core import config
from cantata.core.config import (
    Slot,
    compose,
    load,
    read_config,
    resolved,
    run_stage,
    save_config,
    slot,
    stage_main,
)
from cantata.core.errors import ConfigError, RunError

FILES = {
    "stage.yaml": """
defaults:
  - optimizer: adamw
  - _self_
  - experiment: null
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
name: run
out: outputs/${name}
steps: {max: 3, every: 1}
hydra: {run: {dir: .}, sweep: {dir: outputs, subdir: .}, output_subdir: null}
""",
    "optimizer/adamw.yaml": "_target_: torch.optim.AdamW\n_partial_: true\nlr: 1e-3\n",
    "experiment/typo.yaml": "# @package _global_\nsteps: {mxa: 4}\n",
    "experiment/typo_in_slot.yaml": "# @package _global_\noptimizer: {learning_rate: 4}\n",
    "optimizer/asks.yaml": "_target_: torch.optim.AdamW\n_partial_: true\nlr: ???\neps: ???\n",
}


@dataclass(frozen=True)
class StepsConfig:
    max: int
    every: int


@dataclass(frozen=True)
class StageConfig:
    name: str
    out: str
    steps: StepsConfig
    optimizer: Slot = slot()


Run = Callable[..., int]


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(config, "configs_dir", lambda: tmp_path)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def run(configs: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a stage as its command would."""

    def command(*arguments: str, main: Callable[[StageConfig], int | None] = lambda _: None) -> int:
        monkeypatch.setattr(sys, "argv", ["stage.py", *arguments])
        return run_stage(lambda node: main(load(node, StageConfig)), "stage")

    return command


def loaded(configs: Path, *overrides: str) -> StageConfig:
    composed = compose("stage", overrides, configs)
    return load(composed.node, StageConfig, composed.origins)


def test_load_gives_typed_values(configs: Path) -> None:
    stage = loaded(configs, "name=mine", "steps.max=7")
    assert stage.steps == StepsConfig(max=7, every=1)
    assert stage.out == "outputs/mine"
    assert stage.optimizer == {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}
    assert type(stage.optimizer) is dict


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=typo"], "{}/experiment/typo.yaml: steps.mxa is not a known key; nearest: steps.max"),
        (
            ["experiment=typo_in_slot"],
            "{}/experiment/typo_in_slot.yaml: optimizer.learning_rate is not an argument of "
            "torch.optim.AdamW",
        ),
        (["steps.max=ten"], "override 'steps.max=ten': steps.max must be an integer, not 'ten'"),
        (["+steps.mxa=1"], "override '+steps.mxa=1': steps.mxa is not a known key; nearest: steps.max"),
        (["~steps.max"], "{}/stage.yaml: steps.max is missing"),
        (["~steps"], "{}/stage.yaml: steps is missing"),
        (["name=${nmae}"], "name: Interpolation key 'nmae' not found"),
        (
            ["optimizer=asks"],
            "{}/optimizer/asks.yaml: optimizer.lr must be given, for example on the command line: "
            "optimizer.lr=... (and so must: optimizer.eps)",
        ),
        (
            ["optimizer._target_=torch.optim.Adm"],
            "override 'optimizer._target_=torch.optim.Adm': optimizer._target_ is torch.optim.Adm: "
            "torch.optim has no Adm; nearest: Adam",
        ),
        (["~optimizer._partial_"], "{}/optimizer/adamw.yaml: optimizer.params is missing"),
        (["optimizer=null"], "(overrides: optimizer=null)"),
    ],
)
def test_load_names_the_file_the_key_and_the_nearest_name(
    configs: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(configs, *overrides)
    assert message.replace("{}", str(configs)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_runs_on_the_overrides_of_its_command(run: Run) -> None:
    seen: list[StageConfig] = []
    assert run("steps.max=9", main=seen.append) == 0
    assert seen[0].steps.max == 9


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["experiment=typo"], "typo.yaml: steps.mxa is not a known key; nearest: steps.max"),
        (["experiment=tpyo"], "experiment=tpyo: no such option; nearest: typo"),
        (["setps.max=3"], "override 'setps.max=3': setps.max is not a known key; nearest: steps.max"),
        (["steps.max=[1"], "override 'steps.max=[1'"),
        (["--config-dir", "nowhere"], "nowhere"),
        (["--config-name", "staeg"], "staeg"),
        (["-m", "steps.max=1,2"], "outputs/run is the run directory of two jobs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert line in message
    assert message.count("\n") == 1


def test_errors_inside_a_run_have_their_codes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Callable[[StageConfig], int]:
        def main(stage: StageConfig) -> int:
            raise error

        return main

    assert run(main=fail(ConfigError("bad\nvalue"))) == 2
    assert run(main=fail(RunError("disk full"))) == 1
    assert run(main=fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: bad value\nerror: disk full\nerror: interrupted\n"
    assert run(main=fail(ValueError("a bug"))) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run(main=lambda stage: 75) == 75


def test_only_rank_0_tells_of_a_bad_config(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("experiment=typo") == 2
    assert capsys.readouterr().err == ""

    def lost(stage: StageConfig) -> int:
        raise RunError("lost")

    assert run(main=lost) == 1
    assert capsys.readouterr().err == "error: rank 1: lost\n"


def test_the_composed_config_can_be_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cfg", "job", "steps.max=9") == 0
    shown: Any = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert shown["steps"] == {"max": 9, "every": 1}


def test_hydra_writes_nothing_and_leaves_the_environment_alone(
    run: Run, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert run() == 0
    assert list((configs / "cwd").iterdir()) == []
    assert "HYDRA_FULL_ERROR" not in config.os.environ


def test_a_sweep_needs_and_gets_its_own_run_directories(run: Run) -> None:
    seen: list[str] = []
    assert run("-m", "steps.max=1,2", "name=max-${steps.max}", main=lambda stage: seen.append(stage.out)) == 0
    assert seen == ["outputs/max-1", "outputs/max-2"]


def test_users_add_their_own_folder_of_configs(run: Run, configs: Path) -> None:
    mine = configs / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("# @package _global_\nname: own\n")
    seen: list[str] = []
    assert run("--config-dir", str(mine.parent), "experiment=own", main=lambda s: seen.append(s.name)) == 0
    assert seen == ["own"]


def test_stage_main_leaves_with_the_exit_code(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @stage_main("stage")
    def main(node: DictConfig) -> int:
        return 75

    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 75


def test_save_config_writes_resolved_values_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = resolved(OmegaConf.create({"name": "a", "out": "outputs/${name}"}))
    target = tmp_path / "run" / "config.yaml"
    save_config(values, target)
    assert OmegaConf.load(target).out == "outputs/a"
    assert [path.name for path in target.parent.iterdir()] == ["config.yaml"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_config(values, tmp_path / "other.yaml")
    assert not (tmp_path / "other.yaml").exists()


def test_read_config_reads_it_back(tmp_path: Path) -> None:
    values = {"name": "a", "model": {"sizes": [1, 2], "rate": 1e-6, "weights": None}}
    save_config(values, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == values


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", None])
def test_read_config_refuses_in_one_line(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
        read_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
