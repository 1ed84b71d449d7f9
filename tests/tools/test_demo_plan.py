"""The demo's first screen."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from cantata.tools.demo_plan import ENCORE, MOVEMENTS, WIDTH, opening


def test_the_first_screen_says_what_is_going_to_happen() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120)
    console.print(Panel(opening(Path("outputs/[demo]")), width=WIDTH))
    lines = [line.strip("│╭╮╰╯─ ") for line in text.getvalue().splitlines()]
    shown = " ".join(lines)
    words = ("1. vq", "2. pretrain", "3. sft", "4. lora", "5. pretrain", "6. generate", "outputs/[demo]")
    assert all(word in shown for word in (*words, "About 9 minutes", "the same command"))
    assert len(lines) <= 24
    broken = [does for *_, does in (*MOVEMENTS, ENCORE) if not any(does in line for line in lines)]
    assert broken == []
