"""Every shipped config composes and binds, stays values only, and holds nothing that no code reads."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cantata.core.config import Composed, compose, load
from cantata.core.errors import ConfigError
from cantata.core.locate import configs_dir, recipes_dir
from cantata.core.target import TARGET, find_target
from cantata.train.optim import parameter_groups
from cantata.train.stage import (
    WEIGHTS_WANTED,
    FineTuneStage,
    LoRAStage,
    PretrainStage,
    Stage,
    build_model,
)
from cantata.train.tokenizer_stage import TokenizerStage

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "sft": FineTuneStage,
    "lora": LoRAStage,
    "vq": TokenizerStage,
}
"""Primary configs and their schemas."""
FINE_TUNES = (
    *("emoji_sft", "nlvr_mini", "aria_nlvr2", "aria_refcoco", "aria_nextqa", "aria_code"),
    *("emu3_t2i_sft", "emu3_i2t_sft", "mllama_sft"),
)
"""Experiments of `sft`; those that end in `_lora` are `lora`'s and all others `pretrain`'s."""
MADE_UP = "made-up"
"""Stands in for a value that a config leaves to the user."""


OF_OTHERS = ("engine/ours", "engine/vllm", "task/figures", "task/question", "task/summary", "data/emoji_all")
"""Options that no training takes; the tests of their recipes compose them."""
OF_TOKENIZERS = (
    *("data=emoji_images", "data=images", "collator=pixels_64", "collator=pixels_256"),
    *("experiment=emoji_vq", "experiment=emu3_vq", "experiment=llamagen_f16"),
)
"""Options of `vq` besides its own groups and the models of its own."""
OWN_GROUPS = ("quantizer@model.quantizer", "critic", "perceptual")
"""Groups that only `vq` has."""


def options(group: str) -> list[str]:
    found = sorted(file.stem for file in (configs_dir() / group).glob("*.yaml"))
    return [option for option in found if f"{group}/{option}" not in OF_OTHERS]


GROUPS = sorted(folder.name for folder in configs_dir().iterdir() if folder.is_dir())
PACKAGES = {"quantizer": "quantizer@model.quantizer"}
CHOICES = [f"{PACKAGES.get(group, group)}={option}" for group in GROUPS for option in options(group)]


def made_up(content: Any) -> Any:
    """The same with a value for each `???`."""
    if isinstance(content, dict):
        return {name: made_up(value) for name, value in content.items()}
    return MADE_UP if content == "???" else content


def is_of_tokenizers(override: str) -> bool:
    group, _, option = override.partition("=")
    own_model = group == "model" and ("vqgan" in option or "vqvae" in option)
    return own_model or group in OWN_GROUPS or override in OF_TOKENIZERS


def stage_of(*overrides: str) -> str:
    if any(map(is_of_tokenizers, overrides)):
        return "vq"
    if any(one.startswith("experiment=") and one.endswith("_lora") for one in overrides):
        return "lora"
    return "sft" if {f"experiment={name}" for name in FINE_TUNES} & set(overrides) else "pretrain"


@functools.cache
def composed(*overrides: str) -> Composed:
    return compose(stage_of(*overrides), overrides)


@functools.cache
def loaded(*overrides: str) -> Any:
    node, origins = composed(*overrides)
    filled = OmegaConf.create(made_up(OmegaConf.to_container(node)))
    return load(filled, STAGES[stage_of(*overrides)], origins)


@pytest.mark.parametrize("choice", ["name=plain", *CHOICES])
def test_every_option_of_every_group_binds(choice: str) -> None:
    assert loaded(choice).seed == 1234


@pytest.mark.parametrize(
    "stage", [name for name in options("experiment") if name.startswith("aria_25b_stage")]
)
def test_what_only_the_user_has_is_asked_for_by_name(stage: str) -> None:
    node, origins = composed(f"experiment={stage}")
    with pytest.raises(ConfigError) as caught:
        load(node, PretrainStage, origins)
    asked = ["collator.processor.tokenizer", "data.sources.text.dataset.path"]
    if stage != "aria_25b_stage1":
        asked += ["model.weights", "data.sources.images.dataset.path"]
    assert all(key in str(caught.value) for key in asked)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_run_under_every_engine(experiment: str) -> None:
    for engine in options("engine"):
        loaded(f"experiment={experiment}", f"engine={engine}")


def test_an_experiment_is_named_after_its_file() -> None:
    for experiment in options("experiment"):
        assert loaded(f"experiment={experiment}").out == Path("outputs", experiment)


def test_the_stages_of_aria_follow_the_paper() -> None:
    stages = [loaded(f"experiment=aria_25b_stage{number}") for number in (1, 2, 3)]
    assert [stage.train.sequence_length for stage in stages] == [8192, 8192, 65536]
    assert [stage.model["text"]["rope_theta"] for stage in stages] == [1e5, 1e5, 5e6]
    assert all(stage.model["text"]["moe"]["balance"]["z_loss_coef"] == 1e-5 for stage in stages)
    assert [stage.model["weights"] for stage in stages] == [None, MADE_UP, MADE_UP]


def test_the_fine_tunes_of_aria_follow_their_authors() -> None:
    rates = {"nlvr2": 5e-7, "refcoco": 5e-6, "nextqa": 5e-6, "code": 1e-6}
    for name, rate in rates.items():
        stage = loaded(f"experiment=aria_{name}")
        optimizer, balance = stage.optimizer, stage.model["text"]["moe"]["balance"]
        assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (rate, [0.9, 0.95], 0.1)
        assert (balance["aux_loss_coef"], balance["z_loss_coef"]) == (1e-4, 1e-5)
        assert stage.train.micro_batch_size * stage.train.gradient_accumulation_steps == 16
        assert stage.schedule["_target_"].endswith("Cosine")
        assert stage.schedule["warmup_steps"] == max(1, round(0.01 * stage.train.max_steps))
        assert {pattern: rule.frozen for pattern, rule in stage.parameters.items()} == {"vision.*": True}
        assert stage.model["weights"] == WEIGHTS_WANTED


def test_the_adapter_stage_of_mllama_trains_what_reads_images_alone() -> None:
    stage = loaded("experiment=mllama_adapter")
    model = build_model(stage)
    parameter_groups(model, stage.parameters, 1e-3, 0.01)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = tuple(f"text.layers.{i}." for i in stage.model["text"]["cross_attention_layers"])
    wanted = ("vision.", "projector.", *layers)
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(wanted)}
    assert (stage.optimizer["lr"], stage.optimizer["weight_decay"]) == (1e-3, 0.01)


def test_the_published_mllama_has_the_published_size() -> None:
    model = build_model(loaded("model=mllama_11b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_670_220_835


@pytest.mark.parametrize("file", sorted(configs_dir().rglob("*.yaml")), ids=lambda file: file.stem)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_command_shows_its_config(stage: str, tmp_path: Path) -> None:
    experiment = "experiment=emoji_vq" if stage == "vq" else "experiment=aria_mini"
    command = [sys.executable, "-m", "cantata", stage, "--cfg", "job", experiment]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert OmegaConf.create(shown) == compose(stage, [experiment]).node
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_typo_ends_the_command_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(recipes_dir() / "pretrain.py"), "trian.max_steps=3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == (
        "error: override 'trian.max_steps=3': trian.max_steps is not a known key; nearest: train.max_steps\n"
    )
    assert list(tmp_path.iterdir()) == []


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` below a node."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and TARGET in node:
        yield node[TARGET]
    for child in children:
        yield from targets(child)


def dataclasses_in(annotation: Any) -> Iterator[type]:
    """The dataclasses that an annotation leads to, through containers and fields."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
        for hint in typing.get_type_hints(annotation).values():
            yield from dataclasses_in(hint)
    for argument in typing.get_args(annotation):
        yield from dataclasses_in(argument)


@functools.cache
def schemas() -> tuple[frozenset[type], frozenset[type]]:
    """(dataclasses, other classes of ours) that shipped configs fill."""
    closed = {found for root in STAGES.values() for found in dataclasses_in(root)}
    named = {
        name
        for choice in CHOICES
        for name in targets(OmegaConf.to_container(composed(choice).node))
        if name.startswith("cantata.")
    }
    plain = set()
    for target in map(find_target, named):
        assert isinstance(target, type)
        if dataclasses.is_dataclass(target):
            closed.add(target)
        else:
            plain.add(target)
            for hint in typing.get_type_hints(target.__init__).values():
                closed.update(dataclasses_in(hint))
    return frozenset(closed), frozenset(plain)


def test_every_field_of_a_config_is_read() -> None:
    """A flag nobody reads is a lie: an attribute of that name is read somewhere besides its own checks."""
    read: set[str] = set()
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        read |= {name for name, where in attributes(ast.parse(file.read_text())) if where != "__post_init__"}
    closed, _ = schemas()
    assert len(closed) > 8
    unread = [f"{c.__name__}.{f.name}" for c in closed for f in dataclasses.fields(c) if f.name not in read]
    assert unread == []


def test_every_argument_of_a_slot_is_read() -> None:
    _, plain = schemas()
    assert len(plain) > 4
    for target in plain:
        source = textwrap.dedent(inspect.getsource(target.__init__))
        used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        parameters = set(inspect.signature(target).parameters)
        assert parameters - used == set(), target


def attributes(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Attributes read, with the function they stand in; where `getattr` reads, strings are names."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr, inside
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(part, ast.Name) and part.id == "getattr" for part in ast.walk(node)
        ):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield from ((name, inside) for text in texts for name in str(text).split())
        yield from attributes(node, inside)
