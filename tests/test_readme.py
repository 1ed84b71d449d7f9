"""Every command of the README is one that the program takes: stages bind, other verbs know each flag."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cantata import cli
from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.tools.tokenize import TokenizeConfig
from tests.test_configs import STAGES as TRAINED
from tests.test_configs import made_up

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
STAGES = {**TRAINED, "tokenize": TokenizeConfig}
LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "python")
TOOLS_OF_STAGES = ("plan", "inspect")
WRONG = "train.max_stpes=50"
"""What the README itself shows to be refused."""


def commands() -> list[list[str]]:
    """The words of each line in a block of code that begins with a program's name, comments left out."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if _is_command(line)]
    # `cantata plan pretrain: NAME` is what a program says, and --config-dir names the reader's own folder.
    return [line for line in words if not any(word.endswith(":") or word == "--config-dir" for word in line)]


def _is_command(line: str) -> bool:
    return bool(re.match(rf"(\$ )?(cantata [a-z]+ |({'|'.join(LAUNCHERS)}) )", line))


def stage_and_overrides(words: list[str]) -> tuple[str, list[str]] | None:
    """What a command gives to Hydra; None where it is no stage's."""
    if words[0] == "cantata":
        if words[1] in STAGES:
            return words[1], words[2:]
        if words[1] in TOOLS_OF_STAGES:
            return words[2], [word for word in words[3:] if "=" in word and not word.startswith("--")]
        return None
    place = next((i for i, word in enumerate(words) if word.startswith("recipes/")), None)
    if place is None or Path(words[place]).stem not in STAGES:
        return None
    return Path(words[place]).stem, words[place + 1 :]


COMMANDS = commands()
OF_STAGES = [found for words in COMMANDS if (found := stage_and_overrides(words)) is not None]
OF_OTHERS = [w for w in COMMANDS if w[0] == "cantata" and stage_and_overrides(w) is None]


def test_the_readme_speaks_of_every_verb() -> None:
    assert [
        verb for verb in cli.VERBS if f"cantata {verb}" not in README and f"make {verb}" not in README
    ] == []


@pytest.mark.parametrize(("stage", "overrides"), OF_STAGES, ids=lambda value: str(value)[:60])
def test_a_stage_takes_what_the_readme_gives_it(stage: str, overrides: list[str]) -> None:
    given = [word.partition(",")[0] if "-m" in overrides else word for word in overrides if "=" in word]
    if WRONG in given:
        with pytest.raises(ConfigError, match=r"max_stpes is not a known key; nearest: train\.max_steps"):
            compose(stage, given)
        return
    node, origins = compose(stage, given)
    load(OmegaConf.create(made_up(OmegaConf.to_container(node))), STAGES[stage], origins)


@pytest.mark.parametrize("words", OF_OTHERS, ids=" ".join)
def test_a_verb_knows_its_flags(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([words[1], "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert [word for word in words[2:] if word.startswith("--") and word not in shown] == []
