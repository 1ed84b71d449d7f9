"""A training step of Aria's decoder: ours against transformers', in one process, in turn.

    python benchmarks/train_step.py [--quick]

Both hold the same weights in bf16; both use fused AdamW, SDPA and grouped expert products.
Three questions: tokens per second of a step on full rows; peak memory of a step at Aria's own vocabulary; and
useful tokens per second on the embedded set's real sample lengths, ours packed, the peer's padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import harness
import torch
from decoders import DEVICE, Shape, filled, our_decoder, peer_decoder
from torch import Tensor, nn

from cantata.core.types import IGNORE_INDEX, TEXT, Batch, Images, Segments
from cantata.models.aria import Aria

SHAPE = Shape(384, 6, 6, num_experts=16, top_k=4, num_shared_experts=2, expert_size=256, vocab_size=8192)


def packed(samples: Sequence[Tensor]) -> Batch:
    """Samples end to end; every token but each sample's first is a target."""
    labels = [torch.cat((ids[1:], ids.new_tensor([IGNORE_INDEX]))) for ids in samples]
    ids_T, labels_T = torch.cat(list(samples)), torch.cat(labels)
    target_index_N = torch.nonzero(labels_T != IGNORE_INDEX).flatten()
    empty = torch.empty(0, dtype=torch.int64)
    images = Images(torch.empty((0, 588), dtype=torch.uint8), empty, Segments(()), Segments(()), empty)
    return Batch(
        input_ids_T=ids_T,
        labels_T=labels_T,
        position_ids_T=torch.cat([torch.arange(len(ids)) for ids in samples]),
        modality_ids_T=torch.full_like(ids_T, TEXT),
        target_index_N=target_index_N,
        target_modality_N=torch.full_like(target_index_N, TEXT),
        samples=Segments(tuple(len(ids) for ids in samples)),
        images=images,
    ).to(DEVICE)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def our_step(model: Aria, samples: Sequence[Tensor]) -> Callable[[], float]:
    optimizer = adamw(model)
    batch = packed(samples)

    def step() -> float:
        output = model(batch)
        loss = output.loss_sum / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peer_step(model: nn.Module, samples: Sequence[Tensor]) -> Callable[[], float]:
    """The peer's way: rows padded to the longest sample."""
    optimizer = adamw(model)
    ids_BL = nn.utils.rnn.pad_sequence(list(samples), batch_first=True).to(DEVICE)
    lengths = torch.tensor([len(ids) for ids in samples], device=DEVICE)
    mask_BL = torch.arange(ids_BL.shape[1], device=DEVICE)[None] < lengths[:, None]
    labels_BL = ids_BL.masked_fill(~mask_BL, IGNORE_INDEX)
    mask = None if bool(mask_BL.all()) else mask_BL

    def step() -> float:
        loss = model(input_ids=ids_BL, attention_mask=mask, labels=labels_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def full_rows(vocab_size: int, rows: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(16, vocab_size, (rows, length), generator=generator))


def real_lengths(count: int) -> list[Tensor]:
    """The embedded set: every third a piece of a play, the others captions with room for 16 features."""
    from tokenizers import Tokenizer

    from cantata.core.locate import asset
    from cantata.data.sources import CaptionedImages, TextDocuments

    tokenizer = Tokenizer.from_file(str(asset("embedded:tokenizer.json")))
    emoji = CaptionedImages("embedded:twemoji.parquet", "image", "{name}", "train", 0.05)
    plays = TextDocuments("embedded:tinyshakespeare.txt", 1024, "train", 0.05)
    samples = []
    for index in range(count):
        source = plays if index % 3 == 0 else emoji
        parts = source[index].parts
        text = " ".join(part for part in parts if isinstance(part, str))
        ids = tokenizer.encode(text).ids
        samples.append(torch.tensor(ids if source is plays else [9] * 16 + ids))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer pairs, a smaller vocabulary for the memory figure"
    )
    quick = parser.parse_args().quick
    pairs = 3 if quick else 7
    print(harness.environment())

    ours = filled(our_decoder(SHAPE, SHAPE.unbalanced))
    peer = peer_decoder(SHAPE, ours)
    samples = full_rows(8192, 4, 512)
    mine, other = our_step(ours, samples), peer_step(peer, samples)
    print(f"loss of the first step: ours {mine():.5f}, transformers {other():.5f}")
    own, theirs, speed = harness.alternate(mine, other, pairs)
    harness.figure("tokens_per_second", 4 * 512 / own, "tokens/s (ours)")
    harness.figure("tokens_per_second_peer", 4 * 512 / theirs, "tokens/s (transformers)")

    samples = real_lengths(24)
    useful = sum(len(ids) for ids in samples)
    own, theirs, packing = harness.alternate(our_step(ours, samples), peer_step(peer, samples), pairs)
    harness.figure("useful_tokens_per_second", useful / own, "tokens/s (ours, packed)")
    harness.figure("useful_tokens_per_second_peer", useful / theirs, "tokens/s (transformers, padded)")

    vocab_size = 32768 if quick else 100352
    shape = SHAPE._replace(vocab_size=vocab_size)
    large = filled(our_decoder(shape, shape.unbalanced))
    samples = full_rows(vocab_size, 4, 512)
    own_bytes = harness.peak_bytes(our_step(large, samples))
    peer_bytes = harness.peak_bytes(peer_step(peer_decoder(shape, large), samples))
    harness.figure("memory", own_bytes / 2**20, "MiB (ours)")
    harness.figure("memory_peer", peer_bytes / 2**20, "MiB (transformers)")

    harness.ratio("tokens_per_second", speed)
    harness.ratio("tokens_per_second_packed", packing)
    harness.ratio("memory_large_vocabulary", peer_bytes / own_bytes)


if __name__ == "__main__":
    main()
