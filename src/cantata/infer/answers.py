"""Answers to held-out questions while a model is fine-tuned: generated, or the likeliest of given ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.core.samples import DataError, Sample
from cantata.data.collate.packed import PackedCollator
from cantata.data.held_out import HeldOut
from cantata.infer.generate import generate
from cantata.infer.sample_pictures import keep_pictures, keep_records
from cantata.train.accuracy import AccuracyConfig, Answer, Question, accuracy_metrics, find_questions
from cantata.train.engine import Engine
from cantata.train.evaluate import Shown

SHOWN = 8
PICTURED = 16
"""Answers that are kept with the pictures they speak of."""
T = TypeVar("T")


class Answers:
    """Asks a model held-out questions, counts the right answers and keeps all in `<out>/samples/`.

    The ranks share the questions, in rounds of as many as fit into a micro-batch; a rank that has run out
    goes on with a question that another one counts, so that collectives stay in step.

    Args:
        config: how many questions of each source, and how they are answered.
        held_out: where they come from.
        out: the run directory.
        max_tokens: tokens that one forward takes; a question that is longer by itself is left out.

    Raises `ConfigError` where questions are wanted and no held-out sample holds one.
    """

    def __init__(self, config: AccuracyConfig, held_out: HeldOut, out: Path, max_tokens: int) -> None:
        self._config = config
        self._collator = held_out.collator
        self._out = out
        self._max_tokens = max_tokens
        self._prompted: list[tuple[Question, Sample]] = []
        self._offered: list[tuple[Question, list[Sample]]] = []
        for question in find_questions(held_out, config.samples):
            try:
                self._encode(question)
            except DataError:
                # The held-out pass counts it.
                continue
        self._questions = [question for question, _ in (*self._prompted, *self._offered)]
        if config.samples and not self._questions:
            raise ConfigError(
                f"accuracy.samples={config.samples}, but no held-out sample is a conversation whose last "
                "answer is text and short enough; set accuracy.samples=0"
            )

    def _encode(self, question: Question) -> None:
        processor, choices = self._collator.processor, self._config.choices.get(question.source)
        if choices is None:
            sample = processor.encode_prompt(question.prompt, question.key)
            if len(sample) + self._config.max_new_tokens <= self._max_tokens:
                self._prompted.append((question, sample))
            return
        samples = [processor.encode(question.answered(choice), question.key) for choice in choices]
        if sum(map(len, samples)) <= self._max_tokens:
            self._offered.append((question, samples))

    def __call__(self, step: int, engine: Engine) -> Shown:
        """Answer, write `step-<step>.jsonl`, and return the figures and a few answers."""
        if not self._questions:
            return Shown({}, [])
        own = [*self._generated(engine.model), *self._chosen(engine.model)]
        records = [
            {"sample": key, "truth": truth, "answer": answer.text, "right": answer.is_right}
            for answer in own
            for key, truth in [(answer.question.key, answer.question.truth)]
        ]
        everywhere = [
            record for text in dist.gather_strings(json.dumps(records)) for record in json.loads(text)
        ]
        if dist.is_main():
            folder = self._out / "samples"
            asked = {question.key: question.prompt.messages for question in self._questions}
            for record in everywhere[:PICTURED]:
                parts = [part for message in asked[record["sample"]] for part in message.parts]
                record["images"] = keep_pictures(folder, record["sample"], parts)
            keep_records(folder, step, everywhere)
        # An untrained model's answer may hold line breaks.
        lines_shown = [f"  {one['truth']}: {' '.join(one['answer'].split())}" for one in everywhere[:SHOWN]]
        return Shown(accuracy_metrics(self._questions, own), lines_shown)

    def _generated(self, model: nn.Module) -> list[Answer]:
        processor, new = self._collator.processor, self._config.max_new_tokens
        found = []
        for items, counted in _rounds(self._prompted, lambda item: len(item[1]) + new, self._max_tokens):
            continued = generate(
                model,
                self._collator,
                [sample for _, sample in items],
                max_new_tokens=new,
                stop_token_ids=processor.stop_token_ids,
                temperature=0.0,
                seed=0,
            )
            answers = [
                Answer(question, processor.decode(ids).strip())
                for (question, _), ids in zip(items, continued, strict=True)
            ]
            found += answers[:counted]
        return found

    def _chosen(self, model: nn.Module) -> list[Answer]:
        found = []
        for items, counted in _rounds(self._offered, lambda item: sum(map(len, item[1])), self._max_tokens):
            scores = iter(
                log_likelihoods(model, self._collator, [one for _, samples in items for one in samples])
            )
            for question, samples in items[:counted]:
                own = [next(scores) for _ in samples]
                found.append(Answer(question, self._config.choices[question.source][own.index(max(own))]))
        return found


@torch.no_grad()
def log_likelihoods(model: nn.Module, collator: PackedCollator, samples: Sequence[Sample]) -> list[float]:
    """The log-probability of each sample's targets, all together; they are packed into one row."""
    row = collator.row(samples)
    batch = collator.collate([row], sum(row.lengths)).to(dist.device())
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        loss_N = model(batch).loss_N
    model.train(was_training)
    sample_N = batch.samples.ids(loss_N.device)[batch.target_index_N]
    sums = torch.zeros(len(samples), dtype=torch.float64, device=loss_N.device)
    scores: list[float] = sums.index_add(0, sample_N, -loss_N.double()).tolist()
    return scores


def _rounds(items: Sequence[T], length: Callable[[T], int], max_tokens: int) -> list[tuple[Sequence[T], int]]:
    """This rank's share in rounds that fit into `max_tokens`, and how many of each round count.

    Every rank gets as many; where it has nothing left, the first item of all stands in and does not count.
    """
    if not items:
        return []
    size = max(1, max_tokens // max(map(length, items)))
    own = items[dist.rank() :: dist.world_size()]
    rounds = -(-len(items[:: dist.world_size()]) // size)
    cuts = [own[start * size : (start + 1) * size] for start in range(rounds)]
    return [(cut or items[:1], len(cut)) for cut in cuts]
