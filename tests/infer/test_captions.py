"""Captions of the embedded held-out images, by a small Aria that has learned nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cantata.data.collate import PackedCollator
from cantata.data.held_out import HeldOut
from cantata.data.reading import Source
from cantata.data.split import Split
from cantata.infer import captions
from cantata.infer.captions import COUNT, Captions
from cantata.infer.generate import generate
from cantata.models.aria import Aria, AriaProjectorConfig
from tests.data.helpers import Letters, Words, embedded_sources, mini_processor, source
from tests.models.aria.small import small_aria, small_layout

NEW_TOKENS = 3


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "MAX_NEW_TOKENS", NEW_TOKENS)


def tiny() -> Aria:
    layout = small_layout(vocab_size=6144)
    vision = replace(layout.vision, image_size=64, patch_size=8)
    return small_aria(layout._replace(vision=vision, projector=AriaProjectorConfig({64: 16}, 0.2)))


def held_out(sources: dict[str, Source], collator: PackedCollator) -> HeldOut:
    shape = {"sequence_length": 64, "micro_batch_size": 1, "window": 4, "rank": 0, "world_size": 1}
    return HeldOut(sources, collator, **shape)


def engine(model: nn.Module | None) -> Any:
    return SimpleNamespace(model=model)


def test_each_image_is_captioned_from_its_pixels_alone(tmp_path: Path) -> None:
    model, collator = tiny(), PackedCollator(mini_processor())
    batches: list[Any] = []
    model.register_forward_pre_hook(lambda _, arguments: batches.append(arguments[0]))
    data = held_out(embedded_sources(Split.held_out), collator)
    lines = Captions(data, tmp_path)(20, engine(model)).lines

    records = [
        json.loads(line) for line in (tmp_path / "samples/step-00000020.jsonl").read_text().splitlines()
    ]
    assert lines == [f"  {record['truth']}: {record['caption']}" for record in records]
    documents = dict(data.captioned(COUNT))
    assert [record["sample"] for record in records] == list(documents)
    assert len(records) == COUNT
    assert all(record["truth"] in documents[record["sample"]].parts for record in records)
    for record in records:
        [name] = record["images"]
        [image] = [part for part in documents[record["sample"]].parts if isinstance(part, Image.Image)]
        with Image.open(tmp_path / "samples" / name) as kept:
            assert np.array_equal(np.asarray(kept), np.asarray(image)), "64 pixels need no thumbnail"
    # What the model was shown first is the same tokens for every image, so no truth among them.
    prompts = torch.split(batches[0].input_ids_T, batches[0].samples.lengths)
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)

    sample = collator.processor.encode_prompt(
        replace(documents[records[1]["sample"]], parts=_images(documents, 1))
    )
    alone = generate(
        model, collator, [sample], max_new_tokens=NEW_TOKENS, stop_token_ids=(0,), temperature=0.0, seed=0
    )
    assert records[1]["caption"] == collator.processor.decode(alone[0]).strip()


def _images(documents: dict[str, Any], index: int) -> tuple[Any, ...]:
    return tuple(part for part in list(documents.values())[index].parts if not isinstance(part, str))


def test_nothing_is_shown_or_written_where_no_image_is_held_out(tmp_path: Path) -> None:
    data = held_out({"text": source(Words("text", [5, 9]))}, PackedCollator(Letters()))
    assert Captions(data, tmp_path)(0, engine(None)) == ({}, [])
    assert list(tmp_path.iterdir()) == []
