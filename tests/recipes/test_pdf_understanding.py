"""The PDF recipe: its presets, what must be given, and the file that runs it."""

from __future__ import annotations

import runpy
import sys

import pytest

from cantata.core.config import compose, load
from cantata.core.errors import ConfigError
from cantata.core.locate import recipes_dir
from cantata.tools.pdf_understanding import PdfUnderstanding

STAGE = "pdf_understanding"
GIVEN = ("model.weights=Aria", "file=paper.pdf")


def composed(*overrides: str) -> PdfUnderstanding:
    node, origins = compose(STAGE, [*GIVEN, *overrides])
    return load(node, PdfUnderstanding, origins)


def test_the_published_tasks_compose() -> None:
    assert "figure" in composed("task=figures").prompt
    assert "Summarize" in composed("task=summary").prompt
    assert composed() == composed("task=summary")
    asked = composed("task=question", "prompt=Why?")
    assert (asked.prompt, "LaTeX" in asked.instruction) == ("Why?", True)
    with pytest.raises(ConfigError, match="prompt must be given"):
        composed("task=question")


def test_the_values_are_the_published_ones() -> None:
    config = composed()
    assert (config.pdf.scale, config.image_size, config.split_image) == (2.0, 980, True)
    assert (config.max_model_len, config.sampling.max_new_tokens) == (38400, 4096)
    assert (config.sampling.temperature, config.sampling.stop) == (0.0, ("<|im_end|>",))
    assert composed("engine=vllm").engine["gpu_memory_utilization"] == 0.84


def test_what_is_not_given_or_does_not_fit_is_named() -> None:
    node, origins = compose(STAGE, [])
    with pytest.raises(ConfigError, match=r"model.weights must be given.* \(and so must: file\)"):
        load(node, PdfUnderstanding, origins)
    with pytest.raises(ConfigError, match="FSDP2Engine needs it"):
        composed("engine=fsdp2")


def test_the_recipe_file_runs_its_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pdf_understanding.py", *GIVEN])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(recipes_dir() / f"{STAGE}.py"), run_name="__main__")
    assert end.value.code == 2
    assert "Aria: no such folder" in capsys.readouterr().err
