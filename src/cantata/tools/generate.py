"""`cantata generate MODEL --prompt TEXT`: let a model answer, or go on with a text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.core.samples import Sample
from cantata.infer.continuation import Listener
from cantata.infer.generate import Generated, Generator, check_lengths
from cantata.infer.sampling import SamplingConfig
from cantata.tools.arguments import Parser
from cantata.tools.coded import Coder, reads_pixels
from cantata.tools.draw import add_drawing_arguments, draw
from cantata.tools.export import DTYPES
from cantata.tools.open_model import OpenedModel, load, open_model
from cantata.tools.pages import (
    Reading,
    add_arguments,
    check_pages,
    reading_of,
    refuse_unused,
    reread,
    save_gallery,
)
from cantata.tools.prompts import Prompt, check_text, encode, read_prompts
from cantata.train.humane import count

MAX_NEW_TOKENS = 512
"""Of an answer, unless the command says."""

_EPILOG = """\
--image, --video and --pdf go with every --prompt and stand before its text, in this order. A file of prompts
names its own: {"prompt": "What is it?", "image": "cat.png"} in a line.
"""


def main(arguments: Sequence[str]) -> int:
    """The command; returns 0."""
    given = _parser().parse_args(arguments)
    prompts = _prompts(given)
    refuse_unused(given, prompts)
    if given.max_new_tokens is None:
        given.max_new_tokens = MAX_NEW_TOKENS
    config = SamplingConfig(
        max_new_tokens=given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        stop=tuple(given.stop),
        seed=given.seed,
    )
    if given.out is not None:
        if any(prompt.has_media for prompt in prompts):
            raise ConfigError("--out draws images after texts alone; leave out --image, --video and --pdf")
        return draw(given, [prompt.text for prompt in prompts], config)
    reading = reading_of(given, has_pages=any(prompt.pdfs for prompt in prompts))
    opened = open_model(given.model, given.adapter, merge=given.merge)
    for note in opened.notes:
        sys.stderr.write(f"note: {note}\n")
    opened = reread(opened, reading)
    if given.tokenizer is not None:
        opened = reads_pixels(opened, Coder(given.tokenizer, opened, given.size))
    samples = _samples(opened, prompts, reading, given)
    device = dist.device()
    model = load(opened, device, DTYPES[given.dtype or ("bf16" if device.type == "cuda" else "fp32")])
    generator = Generator(
        model, opened.collator, max_positions=opened.max_positions, max_open=given.batch_size
    )
    start = time.perf_counter()
    listen = None if given.json else in_order(len(prompts))
    answers = generator.generate(samples, config, listen)
    seconds = time.perf_counter() - start
    if given.json:
        _print_json(prompts, answers)
    sys.stderr.write(stats(samples, answers, seconds))
    return 0


def in_order(number: int) -> Listener:
    """Writes texts to stdout as they come: the first that is unfinished at once, the others when it is done.

    Several are told apart by their numbers.
    """
    texts, ended = [""] * number, [False] * number
    current = 0

    def write(index: int, piece: str, is_last: bool) -> None:
        nonlocal current
        texts[index] += piece
        ended[index] = is_last
        while current < number:
            sys.stdout.write(texts[current])
            texts[current] = ""
            if not ended[current]:
                break
            current += 1
            sys.stdout.write("\n")
            if current < number:
                texts[current] = f"[{current + 1}] {texts[current]}"
        sys.stdout.flush()

    if number > 1:
        texts[0] = "[1] "
    return write


def _samples(
    opened: OpenedModel, prompts: Sequence[Prompt], reading: Reading, given: argparse.Namespace
) -> list[Sample]:
    """Encoded, and known to fit, before weights are read."""
    if opened.no_images and any(prompt.has_media for prompt in prompts):
        raise ConfigError(opened.no_images)
    is_chat, budgets = not given.raw, {}
    for index, prompt in enumerate(prompts):
        if prompt.pdfs:
            budgets[index] = check_pages(opened, prompt, reading, given.max_new_tokens, is_chat=is_chat)
    samples = encode(prompts, opened.collator.processor, is_chat=is_chat, pdf=reading.pdf)
    check_lengths(samples, opened.max_positions)
    if given.gallery is not None:
        if len(budgets) != 1:
            raise ConfigError(f"--gallery shows the pages of one prompt; {len(budgets)} have a PDF")
        [(index, budget)] = budgets.items()
        save_gallery(given.gallery, opened, samples[index], budget)
    return samples


def _prompts(given: argparse.Namespace) -> list[Prompt]:
    media = tuple(given.image), tuple(given.video), tuple(given.pdf)
    if given.prompts is None:
        if not given.prompt:
            raise ConfigError("cantata generate: give --prompt TEXT or --prompts FILE")
        prompts = [Prompt(text, *media, f"--prompt {number}") for number, text in enumerate(given.prompt, 1)]
        for prompt in prompts:
            check_text(prompt.text, prompt.origin)
        return prompts
    if given.prompt or any(media):
        raise ConfigError(
            "cantata generate: --prompts names its own files; leave out --prompt, --image, --video and --pdf"
        )
    return read_prompts(given.prompts)


def _print_json(prompts: Sequence[Prompt], answers: Sequence[Generated]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        record = {
            "prompt": prompt.text,
            "text": answer.text,
            "tokens": len(answer.token_ids),
            "finish": "stop" if answer.is_complete else "length",
        }
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def stats(samples: Sequence[Sample], answers: Sequence[Generated], seconds: float) -> str:
    """Tokens read and written, and how fast."""
    new = sum(len(answer.token_ids) for answer in answers)
    cut = sum(not answer.is_complete for answer in answers)
    ended = f"; {cut} of {len(answers)} cut at the limit" if cut else ""
    return (
        f"{count(sum(map(len, samples)))} prompt tokens, {count(new)} new tokens in {seconds:.1f} s "
        f"({new / seconds:.1f} tokens/s){ended}\n"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _parser() -> Parser:
    parser = Parser(
        prog="cantata generate",
        description=(__doc__ or "").split("\n")[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help="a Hugging Face folder, RUN/checkpoints/step-..., or RUN: its newest complete checkpoint",
    )
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="several make a batch")
    asked.add_argument("--prompts", metavar="FILE", type=Path, help="JSON Lines, a prompt in each")
    for kind in ("image", "video", "pdf"):
        asked.add_argument(f"--{kind}", metavar="F", type=Path, action="extend", nargs="+", default=[])
    asked.add_argument(
        "--raw", action="store_true", default=None, help="go on with the text itself; it is no user's turn"
    )
    add_arguments(parser)
    how = parser.add_argument_group("how it goes on")
    how.add_argument("--max-new-tokens", metavar="N", type=int, help=f"at most ({MAX_NEW_TOKENS})")
    how.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: the likeliest (default)")
    how.add_argument("--top-k", metavar="K", type=int, default=0, help="draw among the K likeliest; 0: all")
    how.add_argument("--top-p", metavar="P", type=float, default=1.0, help="draw from the nucleus; 1: all")
    how.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="for tokens seen before; 1: none"
    )
    how.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends an answer; repeatable")
    how.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (%(default)s)")
    add_drawing_arguments(parser)
    run = parser.add_argument_group("how it runs")
    run.add_argument("--adapter", metavar="DIR", type=Path, help="a LoRA adapter, in PEFT's format")
    run.add_argument("--merge", action="store_true", help="add adapters to the weights first: faster")
    run.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bf16 on a GPU, else fp32)")
    run.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        default=8,
        help="prompts that go on at once (%(default)s)",
    )
    run.add_argument(
        "--json", action="store_true", default=None, help="an object for each answer, when all are done"
    )
    return parser
