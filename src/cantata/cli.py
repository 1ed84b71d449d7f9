"""The `cantata` command: a verb, then what that verb takes.

Nothing heavy is imported before the verb is known, so that `cantata --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import runpy
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from cantata import __version__
from cantata.core.errors import CantataError
from cantata.core.locate import recipes_dir
from cantata.core.suggest import hint

USAGE = 2
CLOSED_PIPE = 141
"""As of a process that SIGPIPE ended."""


class Verb(NamedTuple):
    """What a verb does, and who does it: a recipe's file, or a module with `main(argv)`."""

    summary: str
    recipe: str | None = None
    module: str | None = None


VERBS = {
    "pretrain": Verb("Train a model from scratch, or on from weights.", recipe="pretrain.py"),
    "sft": Verb("Fine-tune a model on conversations.", recipe="sft.py"),
    "lora": Verb("Fine-tune a model with low-rank adapters.", recipe="lora.py"),
    "vq": Verb("Train an image tokenizer.", recipe="vq.py"),
    "tokenize": Verb("Turn images and clips into codes, once.", recipe="tokenize_images.py"),
    "plan": Verb("Memory, traffic and work of a stage on any number of ranks.", module="cantata.tools.plan"),
    "inspect": Verb("The data of a stage as its model reads it, as a page.", module="cantata.tools.inspect"),
    "verify": Verb("Compare a Hugging Face folder's model with transformers.", module="cantata.tools.verify"),
    "export": Verb("Write a checkpoint as a Hugging Face folder.", module="cantata.tools.export"),
    "generate": Verb("Let a model answer prompts with images.", module="cantata.tools.generate"),
    "probe": Verb("What a frozen image encoder knows of held-out images.", module="cantata.tools.probe"),
    "report": Verb("Runs as one page, alone or side by side.", module="cantata.tools.report.command"),
    "demo": Verb(
        "A small Aria, pretrained, fine-tuned, adapted and asked, in minutes.", module="cantata.tools.demo"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 failed, 2 wrong usage or configuration.

    141: whoever read standard output went away (`cantata ... | head`), which ends the verb in silence.
    """
    try:
        try:
            return _command(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        # Python flushes standard output once more at exit, and would complain there.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return CLOSED_PIPE


def _command(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(usage())
        return USAGE
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if name == "--version":
        sys.stdout.write(f"cantata {__version__}\n")
        return 0
    if name not in VERBS:
        sys.stderr.write(f"error: {name} is not a verb of cantata{hint(name, VERBS)}\n")
        return USAGE
    return _run(VERBS[name], rest)


def usage() -> str:
    """The help page, from the table of verbs."""
    width = max(map(len, VERBS))
    rows = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: cantata VERB [ARGUMENTS]",
            "",
            *rows,
            "",
            "cantata VERB --help says what a verb takes; cantata --version which version this is.",
            "",
        ]
    )


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more; other pipes break for other reasons."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(verb: Verb, arguments: list[str]) -> int:
    if verb.recipe is not None:
        recipe = str(recipes_dir() / verb.recipe)
        sys.argv = [recipe, *arguments]
        runpy.run_path(recipe, run_name="__main__")
        return 0
    assert verb.module is not None
    try:
        code: int = _imported(verb.module).main(arguments)
    except CantataError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    return code


def _imported(name: str) -> Any:
    """A module, without looks for garbage among all that it brings, which take a fifth of the time."""
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()
