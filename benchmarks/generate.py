"""Greedy decoding of the mini Aria: with a cache, without one, and transformers' `generate`, in turn.

    python benchmarks/generate.py [--quick] [--processor-time]

All hold the same random weights, in fp32 (bf16 on a GPU). A prompt is an image and 32 to 64 tokens; the peer
gets a batch padded on the left. New tokens per second, the prompts' own pass included, for one prompt and for
eight of different lengths.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from transformers import AriaForConditionalGeneration

from cantata.core.build import build
from cantata.core.config import compose, resolved
from cantata.core.samples import ImagePatches, Sample
from cantata.data.collate import PackedCollator
from cantata.infer import generate, sequences
from cantata.models.aria import Aria
from cantata.models.hub import save_to_hub
from cantata.parallel.materialize import RandomInit, materialize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
NEW = 128
FEATURES, PATCHES, SIDE = 16, 64, 8


def build_both(config: dict[str, Any]) -> tuple[Aria, AriaForConditionalGeneration]:
    with torch.device("meta"):
        ours: Aria = build(config["model"])
    materialize(ours, RandomInit(ours, seed=0), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        save_to_hub(ours, ours.hub_layout(), Path(folder) / "hub", max_shard_bytes=10**9)
        peer = AriaForConditionalGeneration.from_pretrained(Path(folder) / "hub", dtype=DTYPE)
    return ours.to(DEVICE, DTYPE).eval(), peer.to(DEVICE).eval()


def prompts(count: int, image_token_id: int) -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for length in random.integers(32, 65, count):
        text = random.integers(16, 6144, length)
        ids = np.concatenate(([image_token_id] * FEATURES, text)).astype(np.int32)
        pixels = random.integers(0, 256, (PATCHES, 3 * SIDE**2), np.uint8)
        image = ImagePatches(pixels, np.arange(PATCHES), FEATURES)
        modality = (ids == image_token_id).astype(np.int8)
        samples.append(Sample("prompt", ids, np.zeros(len(ids), np.float32), modality, (image,)))
    return samples


def our_step(model: Aria, collator: PackedCollator, samples: Sequence[Sample]) -> Callable[[], Any]:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "stop_token_ids": (), "temperature": 0.0, "seed": 0}
    return lambda: generate.generate(model, collator, samples, **settings)


def uncached_step(model: Aria, collator: PackedCollator, samples: Sequence[Sample]) -> Callable[[], Any]:
    step = our_step(model, collator, samples)

    def run() -> Any:
        generate.open_sequences = sequences.RepeatedSequences
        try:
            return step()
        finally:
            generate.open_sequences = sequences.open_sequences

    return run


def peer_step(model: AriaForConditionalGeneration, samples: Sequence[Sample]) -> Callable[[], Any]:
    longest = max(map(len, samples))
    pad, image_token_id = model.config.text_config.pad_token_id, model.config.image_token_id
    ids = torch.full((len(samples), longest), pad)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample) :] = torch.from_numpy(sample.input_ids_T)
        mask[row, longest - len(sample) :] = 1
    grid = torch.from_numpy(np.stack([sample.images[0].patches_PC for sample in samples]))
    pixels = grid.view(-1, SIDE, SIDE, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 64, 64)
    inputs = {
        "input_ids": ids.to(DEVICE),
        "attention_mask": mask.to(DEVICE),
        "pixel_values": (pixels.float() / 127.5 - 1).to(DEVICE, DTYPE),
        "pixel_mask": torch.ones(len(samples), 64, 64, dtype=torch.bool, device=DEVICE),
    }
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": pad}

    def run() -> list[list[int]]:
        found = model.generate(**inputs, **settings, suppress_tokens=[image_token_id])
        return found[:, longest:].tolist()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a machine that others use (CPU only)"
    )
    options = parser.parse_args()
    pairs = 3 if options.quick else 7
    clock = time.process_time if options.processor_time else time.perf_counter
    print(harness.environment())
    config = resolved(compose("pretrain", ["experiment=aria_mini"]).node)
    ours, peer = build_both(config)
    collator: PackedCollator = build(config["collator"])
    ratios = {}
    for count in (1, 8):
        samples = prompts(count, collator.processor.image_token_id)
        mine, slow = our_step(ours, collator, samples), uncached_step(ours, collator, samples)
        other = peer_step(peer, samples)
        print(f"{count} prompts: cached equals uncached {mine() == slow()}, transformers {mine() == other()}")
        own, theirs, ratios[f"tokens_per_second_{count}"] = harness.alternate(
            mine, other, pairs, warmup=1, clock=clock
        )
        _, uncached, ratios[f"tokens_per_second_{count}_uncached"] = harness.alternate(
            mine, slow, max(1, pairs // 3), warmup=0, clock=clock
        )
        harness.figure(f"tokens_per_second_{count}", count * NEW / own, "tokens/s (ours)")
        harness.figure(
            f"tokens_per_second_{count}_uncached", count * NEW / uncached, "tokens/s (ours, no cache)"
        )
        harness.figure(f"tokens_per_second_{count}_peer", count * NEW / theirs, "tokens/s (transformers)")
    for name, value in ratios.items():
        harness.ratio(name, value)


if __name__ == "__main__":
    main()
