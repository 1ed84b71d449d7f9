"""How many answers are right: questions out of conversations, what counts as equal, and the figures."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cantata.core import dist
from cantata.core.chat_template import ASSISTANT
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Message
from cantata.data.held_out import HeldOut
from cantata.train.metrics import Record


@dataclass(frozen=True)
class AccuracyConfig:
    """The keys under `accuracy`."""

    samples: int
    """Held-out conversations of each source that are asked at each evaluation, evenly spread; 0: none."""
    max_new_tokens: int
    """Tokens of a generated answer at most."""
    choices: dict[str, list[str]]
    """Answers to choose from, by source: the model's answer is the likeliest of them, its end included.
    Sources that are not named here are answered by generation."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ConfigError(
                f"accuracy.samples={self.samples} must be 0 (never) or a number of conversations"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"accuracy.max_new_tokens={self.max_new_tokens} must be at least 1")
        for source, choices in self.choices.items():
            if len({normalised(choice) for choice in choices}) < max(2, len(choices)):
                raise ConfigError(f"accuracy.choices.{source} must hold two or more different answers")


class Question(NamedTuple):
    """A held-out conversation up to its last assistant turn."""

    source: str
    key: str
    prompt: Chat
    truth: str
    """What the assistant says there."""

    def answered(self, answer: str) -> Chat:
        """The conversation with `answer` as its last turn, of which alone the loss speaks."""
        asked = tuple(replace(message, weight=0.0) for message in self.prompt.messages)
        return Chat((*asked, Message(ASSISTANT, (answer,), weight=1.0)))


class Answer(NamedTuple):
    """What the model says, after `normalised` beside the truth."""

    question: Question
    text: str

    @property
    def is_right(self) -> bool:
        return normalised(self.text) == normalised(self.question.truth)


def find_questions(held_out: HeldOut, count: int) -> list[Question]:
    """Up to `count` questions of each source, in the same order on every rank.

    Documents, and chats whose last assistant turn opens them or is not text alone, hold no question.
    """
    found = []
    for source, index, example in held_out.spread(count):
        if not isinstance(example, Chat):
            continue
        turns = [place for place, message in enumerate(example.messages) if message.role == ASSISTANT]
        if not turns or turns[-1] == 0:
            continue
        parts = example.messages[turns[-1]].parts
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            prompt = Chat(example.messages[: turns[-1]])
            found.append(Question(source, f"{source}:{index}", prompt, "".join(texts)))
    return found


def normalised(answer: str) -> str:
    """What is compared: NFKC, case folded, white space as single blanks, without a final full stop."""
    return " ".join(unicodedata.normalize("NFKC", answer).casefold().split()).removesuffix(".").rstrip()


def accuracy_metrics(questions: Sequence[Question], own: Sequence[Answer]) -> Record:
    """The share of right answers over all ranks, and that of always saying a source's commonest truth.

    `eval/accuracy` and `eval/majority` over all questions, and both by source; `eval/questions` counts them.

    Args:
        questions: of all ranks, the same list on each.
        own: this rank's answers; together the ranks answer each question once.
    """
    sources = sorted({question.source for question in questions})
    right = Counter(answer.question.source for answer in own if answer.is_right)
    correct = dict(zip(sources, dist.all_reduce_sum([float(right[name]) for name in sources]), strict=True))
    truths = {
        name: Counter(normalised(question.truth) for question in questions if question.source == name)
        for name in sources
    }
    majority = {name: max(counts.values()) for name, counts in truths.items()}
    record: Record = {
        "eval/accuracy": sum(correct.values()) / len(questions),
        "eval/majority": sum(majority.values()) / len(questions),
        "eval/questions": len(questions),
    }
    for name, counts in truths.items():
        record[f"eval/accuracy/{name}"] = correct[name] / counts.total()
        record[f"eval/majority/{name}"] = majority[name] / counts.total()
    return record
