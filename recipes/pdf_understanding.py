"""Aria's multi-page PDF recipe: a question to all pages of a document at once, its budget, and its gallery.

python recipes/pdf_understanding.py model.weights=Aria file=paper.pdf
python recipes/pdf_understanding.py model.weights=Aria file=paper.pdf task=figures pdf.pages=1-9
python recipes/pdf_understanding.py model.weights=Aria file=paper.pdf task=question 'prompt="Which loss?"'
"""

from __future__ import annotations

from omegaconf import DictConfig

from cantata.core.config import load, resolved, stage_main
from cantata.tools.pdf_understanding import PdfUnderstanding, understand


@stage_main("pdf_understanding")
def main(node: DictConfig) -> int:
    return understand(load(node, PdfUnderstanding), resolved(node))


if __name__ == "__main__":
    main()
