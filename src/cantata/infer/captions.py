"""Captions of held-out images while a model trains: what it says beside what it should say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cantata.core import dist
from cantata.core.samples import Document, Sample
from cantata.data.held_out import HeldOut
from cantata.infer.generate import generate
from cantata.infer.sample_pictures import keep_pictures, keep_records
from cantata.models.protocol import Decodes
from cantata.train.engine import Engine
from cantata.train.evaluate import Probe, Shown

COUNT = 8
MAX_NEW_TOKENS = 24


def caption_probe(model: object, held_out: HeldOut, out: Path) -> Probe:
    """`Captions` of a model that writes; nothing is asked of one that does not."""
    return Captions(held_out, out) if isinstance(model, Decodes) else lambda step, engine: Shown({}, [])


class Captions:
    """Shows a model's captions of a few held-out images, and keeps them in `<out>/samples/`.

    Each call is a collective: every rank generates the same captions, so that sharded parameters are gathered
    in step. Nothing is shown where no held-out sample holds an image.
    """

    def __init__(self, held_out: HeldOut, out: Path) -> None:
        self._out = out
        self._collator = held_out.collator
        self._samples = held_out.captioned(COUNT)
        self._prompts = [self._encode(key, document) for key, document in self._samples]

    def _encode(self, key: str, document: Document) -> Sample:
        images = tuple(part for part in document.parts if not isinstance(part, str))
        prompt: Sample = self._collator.processor.encode_prompt(Document(images), key)
        return prompt

    def __call__(self, step: int, engine: Engine) -> Shown:
        """Generate, write `step-<step>.jsonl`, and return a line for each image."""
        if not self._samples:
            return Shown({}, [])
        processor = self._collator.processor
        answers = generate(
            engine.model,
            self._collator,
            self._prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            stop_token_ids=processor.stop_token_ids,
            temperature=0.0,
            seed=step,
        )
        records: list[dict[str, Any]] = [
            {
                "sample": key,
                "truth": " ".join(part.strip() for part in document.parts if isinstance(part, str)),
                "caption": processor.decode(ids).strip(),
            }
            for (key, document), ids in zip(self._samples, answers, strict=True)
        ]
        if dist.is_main():
            folder = self._out / "samples"
            for record, (key, document) in zip(records, self._samples, strict=True):
                record["images"] = keep_pictures(folder, key, document.parts)
            keep_records(folder, step, records)
        return Shown({}, [f"  {record['truth']}: {record['caption']}" for record in records])
