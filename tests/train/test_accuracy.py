"""Questions out of held-out conversations, and when an answer is right."""

from __future__ import annotations

from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Document, Example, Message
from cantata.data.collate import PackedCollator
from cantata.data.held_out import HeldOut
from cantata.train.accuracy import (
    AccuracyConfig,
    Answer,
    Question,
    accuracy_metrics,
    find_questions,
    normalised,
)
from tests.data.helpers import Letters, source


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple(Message(role, (text,)) for role, text in turns))


def held_out(examples: list[Example]) -> HeldOut:
    shape = {"sequence_length": 64, "micro_batch_size": 1, "window": 4, "rank": 0, "world_size": 1}
    return HeldOut({"a": source(examples)}, PackedCollator(Letters()), **shape)


def question(name: str, truth: str) -> Question:
    return Question(name, f"{name}:0", chat(("user", "?")), truth)


def test_a_question_ends_before_the_last_assistant_turn() -> None:
    talk = chat(("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"), ("user", "thanks"))
    [found] = find_questions(held_out([talk]), 5)
    assert (found.key, found.truth, found.prompt) == ("a:0", "two", Chat(talk.messages[:3]))
    answered = found.answered("three")
    assert answered.messages[-1] == Message("assistant", ("three",), 1.0)
    assert [message.weight for message in answered.messages] == [0.0, 0.0, 0.0, 1.0]


def test_what_holds_no_question_is_passed_over() -> None:
    nothing = [Document(("text",)), chat(("user", "?")), chat(("assistant", "hello"))]
    assert find_questions(held_out([*nothing, chat(("user", "?"), ("assistant", "!"))]), 9)[0].key == "a:3"
    assert find_questions(held_out(nothing), 9) == []


def test_questions_are_spread_over_the_source() -> None:
    talks: list[Example] = [chat(("user", "?"), ("assistant", str(number))) for number in range(10)]
    assert [found.truth for found in find_questions(held_out(talks), 4)] == ["0", "2", "5", "7"]
    assert len(find_questions(held_out(talks), 99)) == 10


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("  Smileys &\nEmotion. ", "smileys & emotion", True),
        ("ﬁrst", "First", True),
        ("True", "true.", True),
        ("3.5", "35", False),
        ("Yes, it is", "Yes", False),
        ("", "a", False),
    ],
)
def test_right_is_equal_after_normalisation(said: str, truth: str, right: bool) -> None:
    assert Answer(question("a", truth), said).is_right is right
    assert normalised(normalised(said)) == normalised(said)


def test_shares_and_majorities_by_source_and_together() -> None:
    questions = [question("a", truth) for truth in ("x", "X", "y", "z")] + [question("b", "1")]
    own = [Answer(one, said) for one, said in zip(questions, ("x", "y", "y", "?", "2"), strict=True)]
    assert accuracy_metrics(questions, own) == {
        "eval/accuracy": 2 / 5,
        "eval/majority": 3 / 5,
        "eval/questions": 5,
        "eval/accuracy/a": 2 / 4,
        "eval/majority/a": 2 / 4,
        "eval/accuracy/b": 0.0,
        "eval/majority/b": 1.0,
    }


@pytest.mark.parametrize(
    "changes",
    [{"samples": -1}, {"max_new_tokens": 0}, {"choices": {"a": ["x"]}}, {"choices": {"a": ["x", " X."]}}],
)
def test_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"accuracy.{next(iter(changes))}"):
        AccuracyConfig(**({"samples": 1, "max_new_tokens": 1, "choices": {}} | changes))
