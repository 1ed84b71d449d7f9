"""Answers of a small Aria: chosen as the slow way chooses, shared by ranks, written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cantata.core import dist
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, Document, Example, Message
from cantata.data.collate import PackedCollator
from cantata.data.held_out import HeldOut
from cantata.infer import answers
from cantata.infer.answers import Answers, _rounds, log_likelihoods
from cantata.train.accuracy import AccuracyConfig
from tests.data.helpers import mini_processor, source
from tests.infer.test_captions import engine, tiny

COLORS = ("red", "green", "blue", "dark red")
COLLATOR = PackedCollator(mini_processor())


def talk(color: str) -> Chat:
    picture = Image.new("RGB", (64, 64), color.split()[-1])
    return Chat((Message("user", (picture, "Which colour?")), Message("assistant", (color,))))


def data(examples: list[Example]) -> HeldOut:
    shape = {"sequence_length": 128, "micro_batch_size": 1, "window": 4, "rank": 0, "world_size": 1}
    return HeldOut({"colors": source(examples)}, COLLATOR, **shape)


def config(**changes: Any) -> AccuracyConfig:
    return AccuracyConfig(**({"samples": 4, "max_new_tokens": 2, "choices": {}} | changes))


def written(out: Path, step: int) -> list[dict[str, Any]]:
    text = (out / f"samples/step-{step:08d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@torch.no_grad()
def slow_choice(model: Any, color: str) -> str:
    """By softmax over the logits of each answer alone, its end included."""
    scores = {}
    for choice in COLORS:
        sample = COLLATOR.processor.encode(talk(color), "x")
        length = int(sample.weight_T.argmax())
        whole = COLLATOR.processor.encode(
            Chat((*talk(color).messages[:1], Message("assistant", (choice,)))), "x"
        )
        row = COLLATOR.row([whole])
        batch = COLLATOR.collate([row], len(whole))
        log_TV = model(batch, with_logits=True).logits_TV.log_softmax(-1)
        end = int(whole.weight_T.nonzero()[0].max()) + 1
        ids = whole.input_ids_T
        scores[choice] = sum(log_TV[place - 1, int(ids[place])].item() for place in range(length, end))
    return max(scores, key=lambda choice: scores[choice])


def test_the_choice_is_the_likeliest_answer_with_its_end(tmp_path: Path) -> None:
    model = tiny()
    asked = Answers(config(choices={"colors": list(COLORS)}), data([talk(c) for c in COLORS]), tmp_path, 512)
    record, lines = asked(7, engine(model))
    expected = {color: slow_choice(model, color) for color in COLORS}
    assert {one["truth"]: one["answer"] for one in written(tmp_path, 7)} == expected
    assert record["eval/accuracy"] == sum(said == color for color, said in expected.items()) / 4
    assert record["eval/majority"] == 0.25
    assert record["eval/questions"] == 4
    assert lines == [f"  {color}: {said}" for color, said in expected.items()]


def test_packing_does_not_change_a_likelihood() -> None:
    model = tiny()
    samples = [COLLATOR.processor.encode(talk(color), "x") for color in COLORS]
    together = log_likelihoods(model, COLLATOR, samples)
    alone = [log_likelihoods(model, COLLATOR, [sample])[0] for sample in samples]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(together)) == 4


def test_other_sources_are_answered_by_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parrot(model: Any, collator: Any, prompts: Any, **settings: Any) -> list[list[int]]:
        assert settings["max_new_tokens"] == 2
        assert settings["temperature"] == 0.0
        for prompt in prompts:
            assert COLLATOR.processor.decode(prompt.input_ids_T).rstrip().endswith("assistant")
        return [COLLATOR.processor.tokenizer.encode("Red.").ids for _ in prompts]

    monkeypatch.setattr(answers, "generate", parrot)
    asked = Answers(config(), data([talk(c) for c in COLORS]), tmp_path, 512)
    record, _ = asked(0, engine(None))
    assert (record["eval/accuracy"], record["eval/accuracy/colors"]) == (0.25, 0.25)
    assert [one["right"] for one in written(tmp_path, 0)] == [True, False, False, False]


@pytest.mark.parametrize(("world_size", "max_tokens"), [(1, 30), (2, 30), (3, 20), (5, 100), (4, 10)])
def test_ranks_share_questions_in_equal_rounds(
    monkeypatch: pytest.MonkeyPatch, world_size: int, max_tokens: int
) -> None:
    items = list(range(7))
    monkeypatch.setattr(dist, "world_size", lambda: world_size)
    seen: list[int] = []
    numbers = set()
    for rank in range(world_size):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        rounds = _rounds(items, lambda item: 10, max_tokens)
        numbers.add(len(rounds))
        assert all(0 < len(cut) <= max(1, max_tokens // 10) for cut, _ in rounds)
        seen += [item for cut, counted in rounds for item in cut[:counted]]
    assert sorted(seen) == items
    assert len(numbers) == 1


def test_nothing_is_asked_where_nothing_is_wanted(tmp_path: Path) -> None:
    assert Answers(config(samples=0), data([talk("red")]), tmp_path, 512)(0, engine(None)) == ({}, [])
    assert list(tmp_path.iterdir()) == []


def test_questions_that_are_wanted_and_not_there_are_an_error(tmp_path: Path) -> None:
    for examples, tokens in (([Document(("text",))], 512), ([talk("red")], 20)):
        with pytest.raises(ConfigError, match=r"accuracy\.samples=4, but no held-out sample"):
            Answers(config(), data(examples), tmp_path, tokens)
