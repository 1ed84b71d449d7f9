"""A training step of Mllama, tower included: ours against transformers', in one process, in turn.

    python benchmarks/mllama_step.py [--quick] [--processor-time] [--fp32]

Positions of an image are four times the tower's width, as in the published model they are five times. Both
hold the same weights, in bf16 or with --fp32 in that; both use fused AdamW and SDPA. Three questions: tokens
per second of a step on rows of one length, each with one image of one to four tiles; the same where rows have
0 to 3 images, of which the peer computes 3 for each row; and useful tokens per second on the embedded set's
real lengths, emoji with their names and texts without images, ours packed, the peer's padded to the longest
row, an image for each. The peer computes four tiles of every image, as we do, and attends under a mask.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

from cantata.core.samples import Document, Sample
from cantata.core.types import IGNORE_INDEX
from cantata.data.collate import PackedCollator
from cantata.data.sources import CaptionedImages, TextDocuments
from cantata.models.mllama import Masking, Mllama, MllamaProcessor, MllamaTextConfig, MllamaVisionConfig
from cantata.models.mllama.vision import Embeddings
from cantata.parallel.materialize import RandomInit, materialize
from cantata.tools.verify_mllama import image_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGE_TOKEN, PAD = 9, 1
VISION = MllamaVisionConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_global_layers=2,
    num_attention_heads=4,
    image_size=224,
    patch_size=14,
    num_channels=3,
    max_num_tiles=4,
    intermediate_layers=(0, 1, 2),
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    layer_norm_eps=1e-5,
    initializer_range=0.05,
)
TEXT = MllamaTextConfig(
    vocab_size=6144,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    cross_attention_layers=(2, 5),
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=5e5,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
    initializer_range=0.05,
    initial_gate=0.0,
    bos_token_id=6,
    eos_token_id=0,
    pad_token_id=PAD,
)


def our_model(dtype: torch.dtype) -> Mllama:
    with torch.device("meta"):
        model = Mllama(VISION, TEXT, IMAGE_TOKEN, Masking.meta)
    materialize(model, RandomInit(model, 0), DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    return model.to(dtype).train()


def peer_model(ours: Mllama) -> nn.Module:
    """transformers' model with our weights."""
    layout = ours.hub_layout()
    dtype = next(ours.parameters()).dtype
    config: Any = MllamaConfig.from_dict(layout.hub_config())
    config.text_config.use_cache = False
    model = MllamaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            peer = model.get_parameter(layout.transformers_name(name))
            peer.copy_(parameter.view(peer.shape))
    return model.to(DEVICE).train()


def collator() -> PackedCollator:
    return PackedCollator(
        MllamaProcessor(
            tokenizer="embedded:tokenizer.json",
            image_size=VISION.image_size,
            max_num_tiles=VISION.max_num_tiles,
            patch_size=VISION.patch_size,
            image_token="<|img|>",
            begin_token="<|reserved_6|>",
            header_start="<|im_start|>",
            header_end="<|reserved_7|>",
            message_end="<|im_end|>",
            document_end="<|endoftext|>",
            pad_token="<|pad|>",
            chat_template=None,
        )
    )


def trained(model: nn.Module, loss_of: Callable[[], Any]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def our_step(model: Mllama, samples: Sequence[Sample]) -> Callable[[], float]:
    """All samples in one packed row."""
    packer = collator()
    row = packer.row(samples)
    batch = packer.collate([row], sum(row.lengths)).to(DEVICE)
    return trained(model, lambda: model(batch).loss_sum / batch.num_targets)


def peer_step(model: nn.Module, samples: Sequence[Sample]) -> Callable[[], float]:
    """The peer's way: a row for each sample, all as long as the longest, an image slot in each."""
    longest, most = max(map(len, samples)), max(len(sample.images) for sample in samples)
    rows = [padded(sample, longest, most) for sample in samples]
    inputs = {key: torch.cat([row[key] for row in rows]).to(DEVICE) for key in rows[0]}
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    return trained(model, lambda: model(**inputs).loss)


def padded(sample: Sample, length: int, count: int) -> dict[str, torch.Tensor]:
    """What transformers' processor would hand over: `length` tokens and `count` images."""
    ids = sample.input_ids_T.tolist()
    images = [on_canvas(image.patches_PC, int(image.position_ids_P[0])) for image in sample.images]
    most, side = VISION.max_num_tiles, VISION.image_size
    absent, rest = count - len(images), length - len(ids)
    found = {
        "pixel_values": torch.zeros(1, absent, most, VISION.num_channels, side, side),
        "aspect_ratio_ids": torch.zeros(1, absent, dtype=torch.int64),
        "aspect_ratio_mask": torch.tensor([1] + [0] * (most - 1)).expand(1, absent, most),
    }
    mask = torch.zeros(1, length, count, most, dtype=torch.int64)
    if images:
        given = image_inputs(VISION, ids, images, IMAGE_TOKEN)
        found = {name: torch.cat((given[name], padding), dim=1) for name, padding in found.items()}
        mask[:, : len(ids), : len(images)] = given["cross_attention_mask"]
    found["cross_attention_mask"] = mask
    found["input_ids"] = torch.tensor([ids + [PAD] * rest])
    found["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * rest])
    labels = [token if weight else IGNORE_INDEX for token, weight in zip(ids, sample.weight_T, strict=True)]
    found["labels"] = torch.tensor([labels + [IGNORE_INDEX] * rest])
    return found


def on_canvas(patches_PC: np.ndarray, first_position: int) -> torch.Tensor:
    """Normalised patches, (tiles down, tiles across, patches, values)."""
    from cantata.models.mllama.tiles import canvases

    canvas_id = first_position // (VISION.max_num_tiles * VISION.patches)
    normalised = Embeddings(VISION, 8)._normalised(torch.from_numpy(np.array(patches_PC)))
    return normalised.view(*canvases(VISION.max_num_tiles)[canvas_id - 1], VISION.patches, -1)


ONE_EACH = (((224, 224),), ((400, 200),), ((448, 448),), ((224, 180),))
UP_TO_THREE = (((448, 448),), ((224, 224), (400, 200), (224, 180)), (), ((400, 200),))
"""Width and height of the images of four rows."""


def full_rows(sizes: Sequence[Sequence[tuple[int, int]]], length: int) -> list[Sample]:
    """Rows of one length: images, then text."""
    random, processor = np.random.default_rng(0), collator().processor
    samples = []
    for images in sizes:
        pixels = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in images]
        sample = processor.encode(Document((*map(Image.fromarray, pixels), "x")), "row:0")
        words = random.integers(16, TEXT.vocab_size, length - len(sample)).astype(np.int32)
        samples.append(
            Sample(
                sample.key,
                np.concatenate((sample.input_ids_T, words)),
                np.concatenate((sample.weight_T, np.ones(len(words), np.float32))),
                np.concatenate((sample.modality_ids_T, np.zeros(len(words), np.int8))),
                sample.images,
            )
        )
    return samples


def real_samples(count: int) -> list[Sample]:
    """The embedded set: every third a piece of a play, the others emoji with their names."""
    processor = collator().processor
    emoji = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", "train", 0.05)
    plays = TextDocuments("embedded:tinyshakespeare.txt", 1024, "train", 0.05)
    return [processor.encode((emoji if i % 3 else plays)[i], f"{i}") for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs and shorter rows")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a machine that others use (CPU only)"
    )
    parser.add_argument("--fp32", action="store_true", help="all in fp32")
    options = parser.parse_args()
    pairs, length, count = (3, 128, 9) if options.quick else (7, 512, 24)
    clock = time.process_time if options.processor_time else time.perf_counter
    print(harness.environment())

    ours = our_model(torch.float32 if options.fp32 else torch.bfloat16)
    peer = peer_model(ours)
    ratios = {}
    for name, sizes in (("tokens_per_second", ONE_EACH), ("tokens_per_second_mixed_images", UP_TO_THREE)):
        samples = full_rows(sizes, length)
        mine, other = our_step(ours, samples), peer_step(peer, samples)
        print(f"loss of the first step, {name}: ours {mine():.5f}, transformers {other():.5f}")
        ratios[name] = measure(name, len(samples) * length, mine, other, pairs, clock)
    samples = real_samples(count)
    steps = our_step(ours, samples), peer_step(peer, samples)
    packed = "useful_tokens_per_second"
    ratios["tokens_per_second_packed"] = measure(packed, sum(map(len, samples)), *steps, pairs, clock)
    for name, value in ratios.items():
        harness.ratio(name, value)


def measure(
    name: str, tokens: int, ours: harness.Step, peer: harness.Step, pairs: int, clock: harness.Clock
) -> float:
    """Prints tokens a second of both; returns the ratio."""
    own, theirs, ratio = harness.alternate(ours, peer, pairs, clock=clock)
    harness.figure(name, tokens / own, "tokens/s (ours)")
    harness.figure(f"{name}_peer", tokens / theirs, "tokens/s (transformers)")
    return ratio


if __name__ == "__main__":
    main()
