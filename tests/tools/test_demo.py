"""What the demo shows of a run, from a run directory made by hand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cantata.core.errors import RunError
from cantata.core.locate import recipes_dir
from cantata.tools import demo
from cantata.tools.demo import held_out_losses, show

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 9.0, "eval/initial/loss": 8.75},
    {"step": 2, "loss": 7.0},
    {"step": 3, "loss": 5.0, "eval/loss": 4.5},
    {"step": 4, "loss": 3.0, "eval/loss": 2.25},
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def caption(says: str) -> list[dict[str, Any]]:
    return [{"sample": "emoji:7", "truth": "grinning cat", "caption": says}]


def test_losses_are_the_first_and_the_last_ones(tmp_path: Path) -> None:
    assert held_out_losses(write(tmp_path / "metrics.jsonl", LINES)) == (8.75, 2.25)


@pytest.mark.parametrize("lines", [[], LINES[1:2], LINES[:2], LINES[2:]])
def test_a_run_that_was_not_evaluated_is_told_what_to_set(
    tmp_path: Path, lines: list[dict[str, Any]]
) -> None:
    with pytest.raises(RunError, match=r"metrics\.jsonl holds no evaluation; run with train\.eval_every"):
        held_out_losses(write(tmp_path / "metrics.jsonl", lines))


def test_the_table_sets_the_last_captions_beside_the_first(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", LINES)
    for step, says in ((0, "zzz"), (50, "midway"), (100, "cat with é [bold]")):
        write(tmp_path / "samples" / f"step-{step:08d}.jsonl", caption(says))
    text = io.StringIO()
    show(Console(file=text, width=200), tmp_path)
    shown = text.getvalue()
    assert all(word in shown for word in ("grinning cat", "zzz", "cat with é"))
    assert "midway" not in shown
    assert "before 8.7500, after 2.2500" in shown


def test_a_caption_is_shown_as_it_is(tmp_path: Path) -> None:
    """A model may well say what a terminal would take for markup."""
    write(tmp_path / "metrics.jsonl", LINES)
    write(tmp_path / "samples" / "step-00000000.jsonl", caption("[/b] [red]"))
    text = io.StringIO()
    show(Console(file=text, width=200), tmp_path)
    assert "[/b] [red]" in text.getvalue()


def test_missing_captions_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", LINES)
    with pytest.raises(RunError, match="holds no captions"):
        show(Console(file=io.StringIO()), tmp_path)


@pytest.mark.parametrize("code", [0, 75])
def test_it_trains_by_the_recipe_and_shows_only_what_is_finished(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, shown = [], []

    def run(command: list[str], check: bool) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "show", lambda console, out: shown.append(out))
    assert demo.main(["--out", str(tmp_path), "train.max_steps=20"]) == code
    recipe = [sys.executable, str(recipes_dir() / "pretrain.py")]
    assert commands == [[*recipe, "experiment=aria_mini", f"out={tmp_path}", "train.max_steps=20"]]
    assert shown == ([] if code else [tmp_path])
