"""What `recipes/pdf_understanding.py` runs: one document, one question, one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cantata.core.build import build
from cantata.core.config import save_config
from cantata.core.errors import ConfigError
from cantata.core.schema import slot
from cantata.data.media.pdf import PdfOptions
from cantata.infer.gallery import GalleryConfig
from cantata.infer.sampling import SamplingConfig
from cantata.tools.answering import Answering
from cantata.tools.generate import stats
from cantata.tools.open_model import open_model
from cantata.tools.pages import Reading, check_pages, reread, save_gallery
from cantata.tools.prompts import Prompt, encode

CHOICES = {
    "pages": "pdf.pages={}",
    "image_size": "image_size={}",
    "whole": "split_image=false",
    "max_model_len": "max_model_len={}",
    "max_new_tokens": "sampling.max_new_tokens={}",
}
"""How the recipe spells what makes a prompt fit."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the model lies."""

    weights: Path
    """A Hugging Face folder, a run, or a checkpoint; for vLLM a Hugging Face folder."""
    adapter: Path | None
    """A LoRA adapter in PEFT's format, over a Hugging Face folder; a run brings its own."""


@dataclass(frozen=True, kw_only=True)
class PdfUnderstanding:
    """A question to a document."""

    name: str
    out: Path
    """Gets `gallery.png`, `answer.txt` and `config.yaml`."""
    model: ModelFiles
    engine: dict[str, Any] = slot()
    """Who answers: a `cantata.tools.answering.Answering`."""
    file: Path
    """The PDF."""
    prompt: str
    """What is asked, behind the pages."""
    instruction: str
    """How it is to be answered, behind the question; may be empty."""
    pdf: PdfOptions
    image_size: int | None
    """Pixels of a crop's longest side; null: as the model's files say."""
    split_image: bool
    """Whether a page is split into crops, the whole page before them."""
    max_model_len: int
    """Tokens of the prompt and its answer, at most."""
    sampling: SamplingConfig
    gallery: GalleryConfig


def understand(config: PdfUnderstanding, resolved: Mapping[str, Any]) -> int:
    """Budget, gallery, answer; all but the answer before weights are read. Returns 0.

    Raises `ConfigError` for a file that cannot be read, pages that do not fit, an engine that is not there.
    """
    engine: Answering = build(config.engine)
    engine.check(config.model.weights, config.model.adapter)
    prompt = Prompt(f"{config.prompt} {config.instruction}".strip(), pdfs=(config.file,))
    reading = Reading(config.pdf, config.max_model_len, config.image_size, config.split_image, CHOICES)
    opened = open_model(config.model.weights, config.model.adapter)
    for note in opened.notes:
        sys.stderr.write(f"note: {note}\n")
    if opened.no_images:
        raise ConfigError(opened.no_images)
    opened = reread(opened, reading)
    max_new_tokens, only_largest = config.sampling.max_new_tokens, engine.only_largest
    budget = check_pages(opened, prompt, reading, max_new_tokens, is_chat=True, only_largest=only_largest)
    [sample] = encode([prompt], opened.collator.processor, is_chat=True, pdf=config.pdf)
    save_gallery(config.out / "gallery.png", opened, sample, budget, config.gallery)
    save_config(resolved, config.out / "config.yaml")
    start = time.perf_counter()
    answer = engine.answer(config.model.weights, opened, sample, budget.limits.tokens, config.sampling)
    sys.stderr.write(stats([sample], [answer], time.perf_counter() - start))
    (config.out / "answer.txt").write_text(answer.text + "\n", encoding="utf-8")
    return 0
