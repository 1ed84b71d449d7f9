"""A question to a document on a tiny Aria with random weights: budget, answer, and what is left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from cantata import cli
from cantata.core.config import load, read_config, run_stage
from cantata.core.locate import configs_dir, recipes_dir
from cantata.tools.open_model import open_model
from cantata.tools.pdf_understanding import PdfUnderstanding, understand
from tests.data.media.test_pdf import document
from tests.tools.test_export import make_run

STAGE = "pdf_understanding"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "run")
    (folder / "two.pdf").write_bytes(document([(40, 60), (60, 40)]))
    return folder / "run"


def recipe(run: Path, out: Path, *overrides: str, model: Path | None = None) -> int:
    """Exit code of the recipe, in this process."""
    given = (f"model.weights={model or run}", f"file={run.parent / 'two.pdf'}", f"out={out}", "image_size=64")
    arguments = (*given, "sampling.max_new_tokens=5", *overrides)
    argv = sys.argv
    sys.argv = [str(recipes_dir() / f"{STAGE}.py"), *arguments]

    def main(node: Any) -> int:
        return understand(load(node, PdfUnderstanding), {"name": node.name})

    try:
        return run_stage(main, STAGE)
    finally:
        sys.argv = argv


def test_the_recipe_answers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe(run, tmp_path / "out", "task=figures") == 0
    shown = capsys.readouterr()
    assert (tmp_path / "out/answer.txt").read_text() == shown.out
    assert shown.out.strip()
    assert "two.pdf: 2 pages, 64 px, split into crops" in shown.err
    with Image.open(tmp_path / "out/gallery.png") as gallery:
        assert f"{gallery.width} x {gallery.height}" in shown.err
    assert read_config(tmp_path / "out/config.yaml") == {"name": STAGE}
    # The command asks the same in the same way.
    prompt = read_config(configs_dir() / "task" / "figures.yaml")["prompt"]
    arguments = ("--pdf", str(run.parent / "two.pdf"), "--prompt", prompt, "--max-new-tokens", "5")
    assert cli.main(["generate", str(run), *arguments]) == 0
    assert capsys.readouterr().out == shown.out


def test_pages_that_do_not_fit_leave_nothing_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(run, tmp_path / "out", "max_model_len=200") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 2 pages make a prompt of ")
    assert "choose: pdf.pages=1 (" in error
    assert "split_image=false (" in error
    assert not (tmp_path / "out").exists()


def test_vllm_gets_the_whole_prompt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    output = SimpleNamespace(token_ids=(5,), text="an answer", finish_reason="length")

    def llm(**given: Any) -> Any:
        asked.append(given)
        done = [SimpleNamespace(outputs=[output])]
        return SimpleNamespace(generate=lambda prompts, sampling: asked.append(prompts[0]) or done)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm, SamplingParams=dict))
    hub = tmp_path / "hub"
    assert cli.main(["export", str(run), "--to", str(hub)]) == 0
    # No published folder says how 64-px images are read, so the run's own processor stands in.
    opened = open_model(run)
    monkeypatch.setattr("cantata.tools.pdf_understanding.open_model", lambda path, adapter: opened)
    capsys.readouterr()
    assert recipe(run, tmp_path / "out", "engine=vllm", "model.adapter=lora", model=hub) == 2
    assert f"cantata export lora --merge --base {hub}" in capsys.readouterr().err
    assert recipe(run, tmp_path / "out", "engine=vllm", model=hub) == 0
    made, prompt = asked
    assert (made["model"], made["max_model_len"]) == (str(hub), 2048)
    assert len(prompt["multi_modal_data"]["image"]) == made["limit_mm_per_prompt"]["image"] == 14
    assert capsys.readouterr().out == "an answer\n"
