"""What README and docs say is so: stages bind, verbs know each flag, links lead on, error lines are ours."""

from __future__ import annotations

import ast
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

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
STAGES = {**TRAINED, "tokenize": TokenizeConfig}
LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "python")
TOOLS_OF_STAGES = ("plan", "inspect")
WRONG = "train.max_stpes=50"
"""What the README itself shows to be refused."""


def commands() -> list[list[str]]:
    """The words of each line in a block of code that begins with a program's name, comments left out.

    What several pages show is there once.
    """
    blocks = [block for text in PAGES.values() for block in _blocks(text)]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if _is_command(line)]
    # `cantata plan pretrain: NAME` is what a program says, and --config-dir names the reader's own folder.
    kept = [line for line in words if not any(word.endswith(":") or word == "--config-dir" for word in line)]
    return [list(line) for line in dict.fromkeys(map(tuple, kept))]


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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


def test_every_verb_is_spoken_of() -> None:
    text = "".join(PAGES.values())
    assert [verb for verb in cli.VERBS if f"cantata {verb}" not in text and f"make {verb}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        if not found.exists() or (anchor and anchor not in _anchors(found.read_text())):
            dead.append(target)
    assert dead == []


def _anchors(text: str) -> list[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES[ROOT / "README.md"]
    assert [
        page.name for page in PAGES if page.parent.name == "docs" and f"docs/{page.name}" not in readme
    ] == []


def spoken() -> str:
    """Every text in the sources, a line each; what a text fills in is a blank mark."""
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                values = node.values
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_quoted_lines_are_what_the_program_says() -> None:
    """Each piece of a symptom between two `...`; pieces of a word or two would prove nothing."""
    rows = [row.split("|") for row in PAGES[ROOT / "docs" / "troubleshooting.md"].splitlines()]
    quotes = [quote for row in rows if len(row) > 2 for quote in re.findall(r"`([^`]+)`", row[1])]
    pieces = [piece.strip(" ();:,") for quote in quotes for piece in quote.split("...")]
    checked, known = [piece for piece in pieces if len(piece.split()) > 3], spoken()
    assert len(checked) > 20
    assert [piece for piece in checked if piece not in known] == []


@pytest.mark.parametrize(("stage", "overrides"), OF_STAGES, ids=lambda value: str(value)[:60])
def test_a_stage_takes_what_a_page_gives_it(stage: str, overrides: list[str]) -> None:
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
