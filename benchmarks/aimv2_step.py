"""A step of AIMv2's pretraining: ours against transformers' modules, in one process, in turn.

    python benchmarks/aimv2_step.py [--quick]

The peer is the same step as one puts it together from transformers: `Aimv2VisionModel` under a prefix mask,
whose features and the captions' embeddings go through a `LlamaForCausalLM` padded to the longest caption.
Both hold the same weights in fp32, use SDPA and fused AdamW, and have the same loss. Questions: images per
second of a step on squares; the same on images of the sizes that photographs have, ours packed, the peer's
padded to the most rows and columns; and peak memory of a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import harness
import torch
from torch import Tensor, nn
from train_step import adamw
from transformers import Aimv2VisionConfig as PeerVisionConfig
from transformers import Aimv2VisionModel, LlamaConfig, LlamaForCausalLM

from cantata.core.types import IGNORE_INDEX, IMAGE, Batch, Images, Segments, StepTotals
from cantata.models.aimv2 import Aimv2DecoderConfig, Aimv2Pretraining, Aimv2VisionConfig
from cantata.models.aimv2.processor import native_grid
from cantata.parallel.materialize import RandomInit, materialize
from cantata.train.autoregression import MultimodalAutoregression, normalised

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, HEADS, VOCABULARY, PATCH = 256, 4, 8192, 14
ALPHA = 0.4
PHOTOGRAPHS = (
    *((640, 480), (480, 640), (500, 375), (375, 500), (640, 427), (427, 640), (1024, 683), (768, 1024)),
    *((1280, 720), (720, 1280), (800, 800), (320, 240), (200, 300), (1600, 900), (150, 150), (960, 400)),
)
"""Columns and rows of pixels, as photographs and pictures on the web commonly have them."""
CAPTIONS = (9, 14, 7, 31, 11, 18, 5, 24)
"""Tokens of captions, in turn."""


def our_model(native: bool, layers: int) -> Aimv2Pretraining:
    vision = Aimv2VisionConfig(
        *(WIDTH, 704, layers, HEADS),
        image_size=PATCH * (128 if native else 16),
        patch_size=PATCH,
        num_channels=3,
        rms_norm_eps=1e-5,
        is_native=native,
        use_head=False,
        initializer_range=0.06,
    )
    decoder = Aimv2DecoderConfig(VOCABULARY, WIDTH, 704, layers // 2, HEADS, 1e4, 1e-5, 8192, 0.06)
    with torch.device("meta"):
        model = Aimv2Pretraining(vision, decoder)
    materialize(model, RandomInit(model, seed=0), DEVICE)
    return model.train()


class Peer(nn.Module):
    """Encoder, connector, decoder and pixel head, with our weights."""

    def __init__(self, ours: Aimv2Pretraining) -> None:
        super().__init__()
        vision, decoder = ours.vision_config, ours.decoder_config
        settings = ours.hub_layout().hub_config() | {"architectures": None}
        self.encoder = Aimv2VisionModel(PeerVisionConfig(**settings, attn_implementation="sdpa"))
        self.connector = nn.Linear(vision.hidden_size, decoder.hidden_size, bias=False)
        self.decoder = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=decoder.vocab_size,
                hidden_size=decoder.hidden_size,
                intermediate_size=decoder.intermediate_size,
                num_hidden_layers=decoder.num_hidden_layers,
                num_attention_heads=decoder.num_attention_heads,
                rms_norm_eps=decoder.rms_norm_eps,
                rope_theta=decoder.rope_theta,
                max_position_embeddings=decoder.max_position_embeddings,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        )
        self.norm = nn.RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)
        self.output = nn.Linear(decoder.hidden_size, vision.patch_values)
        self.load_state_dict(self._weights(ours), strict=False)

    def _weights(self, ours: Aimv2Pretraining) -> dict[str, Tensor]:
        layout, state = ours.hub_layout(), {}
        for name, value in ours.state_dict().items():
            if name.startswith("vision."):
                key = f"encoder.{layout.to_hub(name)}"
                value = value.reshape(layout.hub_shape(name, value.shape))
            elif name == "decoder.connector.weight":
                key = "connector.weight"
            elif name.startswith("decoder."):
                key = f"decoder.model.{name.removeprefix('decoder.')}"
            elif name.startswith("head."):
                key = {"head.norm.weight": "decoder.model.norm.weight"}.get(name, "decoder.lm_head.weight")
            else:
                key = name.removeprefix("pixel_head.")
            state[key] = value
        return state


class Sample:
    """An image of so many rows and columns of patches, the prefix of it, and a caption."""

    def __init__(self, number: int, rows: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.rows, self.columns = rows, columns
        self.pixels_CHW = torch.randn(3, rows * PATCH, columns * PATCH, generator=generator)
        self.prefix = int(torch.randint(1, rows * columns, (), generator=generator))
        length = CAPTIONS[number % len(CAPTIONS)]
        self.caption = torch.randint(16, VOCABULARY, (length,), generator=generator)

    @property
    def patches_PC(self) -> Tensor:
        blocks = self.pixels_CHW.view(3, self.rows, PATCH, self.columns, PATCH).permute(1, 3, 0, 2, 4)
        return blocks.reshape(self.rows * self.columns, -1)


def packed(samples: Sequence[Sample], grid: int) -> Batch:
    """Patches and captions end to end; each caption weighs 1."""
    ids, labels, weights, places, start = [], [], [], [], 0
    for sample in samples:
        patches, text = sample.rows * sample.columns, sample.caption
        ids.append(torch.cat((torch.full((patches,), 9), text)))
        ahead = torch.cat((torch.full((patches - 1,), IGNORE_INDEX), text, torch.tensor([IGNORE_INDEX])))
        labels.append(ahead)
        weights.append(torch.full((len(text),), 1 / len(text)))
        places.append(torch.arange(start, start + patches))
        start += len(ids[-1])
    positions = [
        (torch.arange(one.rows)[:, None] * grid + torch.arange(one.columns)).flatten() for one in samples
    ]
    labels_T = torch.cat(labels)
    target_index_N = (labels_T != IGNORE_INDEX).nonzero().flatten()
    patches = Segments(tuple(map(len, positions)))
    return Batch(
        input_ids_T=torch.cat(ids),
        labels_T=labels_T,
        position_ids_T=torch.cat([torch.arange(len(one)) for one in ids]),
        modality_ids_T=torch.full_like(labels_T, IMAGE),
        target_index_N=target_index_N,
        target_modality_N=torch.full_like(target_index_N, IMAGE),
        samples=Segments(tuple(map(len, ids))),
        images=Images(
            torch.cat([one.patches_PC for one in samples]),
            torch.cat(positions),
            patches,
            patches,
            torch.cat(places),
            prefix=Segments(tuple(one.prefix for one in samples)),
        ),
        target_weight_N=torch.cat(weights),
    ).to(DEVICE)


def our_step(model: Aimv2Pretraining, samples: Sequence[Sample]) -> Callable[[], float]:
    batch, optimizer = packed(samples, model.vision_config.grid), adamw(model)
    objective = MultimodalAutoregression(model, ALPHA, 1.0)
    totals = StepTotals(batch.num_tokens, batch.num_targets, batch.target_weight)

    def step() -> float:
        loss = objective(model, batch, totals).value
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Padded:
    """Images padded to the most rows and columns, captions to the longest: what the peer is given."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        rows, columns = max(one.rows for one in samples), max(one.columns for one in samples)
        self.count, self.length = rows * columns, max(len(one.caption) for one in samples)
        grid, size = torch.arange(self.count).view(rows, columns), len(samples)
        pixels = torch.zeros(size, 3, rows * PATCH, columns * PATCH)
        # Padding sees itself alone: a row that sees nothing has no softmax.
        visible = torch.eye(self.count, dtype=torch.bool).repeat(size, 1, 1, 1)
        valid = torch.zeros(size, self.count + self.length, dtype=torch.bool)
        labels = torch.full((size, self.length), IGNORE_INDEX)
        weights, before, wanted, share, last = torch.zeros(size, self.length), [], [], [], []
        for number, one in enumerate(samples):
            place = grid[: one.rows, : one.columns].flatten()
            order, text = torch.arange(len(place)), len(one.caption)
            pixels[number, :, : one.rows * PATCH, : one.columns * PATCH] = one.pixels_CHW
            visible[number, 0, place[:, None], place] = (order <= order[:, None]) | (order < one.prefix)
            valid[number, place] = valid[number, self.count : self.count + text] = True
            labels[number, :text] = one.caption
            weights[number, :text] = 1 / text
            before.append(number * valid.shape[1] + place[one.prefix - 1 : -1])
            wanted.append(number * self.count + place[one.prefix :])
            share.append(torch.full((len(wanted[-1]),), 1 / len(wanted[-1])))
            last.append(place[-1])
        self.pixels, self.valid, self.labels, self.weights = (
            x.to(DEVICE) for x in (pixels, valid, labels, weights)
        )
        self.mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")).to(DEVICE)
        self.positions = (valid.cumsum(1) - 1).to(DEVICE)
        self.before, self.wanted, self.share = (torch.cat(x).to(DEVICE) for x in (before, wanted, share))
        self.last = torch.stack(last).to(DEVICE)

    def target_patches(self) -> Tensor:
        """Values of the patches to predict."""
        return (
            nn.functional.unfold(self.pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)[self.wanted]
        )


def peer_step(model: Peer, samples: Sequence[Sample]) -> Callable[[], float]:
    optimizer, given = adamw(model), Padded(samples)
    text, every = given.labels.clamp_min(0), torch.arange(len(samples), device=DEVICE)

    def step() -> float:
        features = model.encoder(pixel_values=given.pixels, attention_mask=given.mask).last_hidden_state
        embedded = model.decoder.model.embed_tokens(text)
        inputs = torch.cat((model.connector(features), embedded), dim=1)
        masks = {"attention_mask": given.valid, "position_ids": given.positions}
        hidden = model.decoder.model(inputs_embeds=inputs, use_cache=False, **masks).last_hidden_state
        # All rows, as `LlamaForCausalLM` has them.
        logits = model.decoder.lm_head(hidden)
        # The text follows the last patch that is one, wherever padding stands between them.
        ahead = torch.cat((logits[every, given.last][:, None], logits[:, given.count : -1]), dim=1)
        losses = nn.functional.cross_entropy(
            ahead.flatten(0, 1), given.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        predicted = model.output(model.norm(hidden.flatten(0, 1)[given.before]))
        errors = (predicted - normalised(given.target_patches())).square().mean(1)
        total = (losses * given.weights.flatten()).sum() + ALPHA * (errors * given.share).sum()
        loss = total / len(samples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def photographs(count: int, most: int) -> list[Sample]:
    """Images of common sizes, scaled down to `most` patches where they are larger."""
    grids = [native_grid(*PHOTOGRAPHS[i % len(PHOTOGRAPHS)], PATCH, most, 128) for i in range(count)]
    return [Sample(i, *grid) for i, grid in enumerate(grids)]


def compare(
    samples: Sequence[Sample], native: bool, layers: int, pairs: int, clock: harness.Clock, name: str
) -> tuple[float, float]:
    """Ratios of speed and of peak memory."""
    ours = our_model(native, layers)
    peer = Peer(ours).to(DEVICE).train()
    mine, other = our_step(ours, samples), peer_step(peer, samples)
    print(f"loss of the first step, {name}: ours {mine():.5f}, transformers {other():.5f}")
    own, theirs, speed = harness.alternate(mine, other, pairs, warmup=1, clock=clock)
    harness.figure(f"images_per_second_{name}", len(samples) / own, "images/s (ours)")
    harness.figure(f"images_per_second_{name}_peer", len(samples) / theirs, "images/s (transformers)")
    return speed, harness.peak_bytes(other) / harness.peak_bytes(mine)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs, layers and images")
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread: where others use the machine as well"
    )
    given = parser.parse_args()
    quick, clock = given.quick, time.perf_counter
    if given.processor_time:
        torch.set_num_threads(1)
        clock = time.process_time
    pairs, layers, count, most = (1, 2, 4, 128) if quick else (5, 6, 16, 576)
    print(harness.environment())
    squares = [Sample(number, 16, 16) for number in range(count)]
    fixed, memory = compare(squares, False, layers, pairs, clock, "squares")
    native, native_memory = compare(photographs(count, most), True, layers, pairs, clock, "native")
    harness.ratio("images_per_second", fixed)
    harness.ratio("images_per_second_native", native)
    harness.ratio("memory_step", memory)
    harness.ratio("memory_step_native", native_memory)


if __name__ == "__main__":
    main()
