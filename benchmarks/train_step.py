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
from torch import Tensor, nn
from transformers import AriaTextConfig as PeerConfig
from transformers import AriaTextForCausalLM

from cantata.core.types import IGNORE_INDEX, TEXT, Batch, Images, Segments
from cantata.models.aria import Aria, AriaMoEConfig, AriaProjectorConfig, AriaTextConfig, AriaVisionConfig
from cantata.nn.moe.balance import BalanceConfig
from cantata.parallel.materialize import RandomInit, materialize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, LAYERS, HEADS, EXPERTS, TOP_K, SHARED, WIDTH = 384, 6, 6, 16, 4, 2, 256


def our_model(vocab_size: int) -> Aria:
    """The decoder in Aria; its tower is one narrow layer that sees no patches."""
    moe = AriaMoEConfig(EXPERTS, TOP_K, SHARED, WIDTH, 1, 1, BalanceConfig(0.0, EXPERTS, {}, 0.0, 0.0, 0.0))
    text = AriaTextConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        rope_theta=1e5,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        moe=moe,
    )
    vision = AriaVisionConfig(16, 16, 1, 1, 28, 14, 3, 1e-6, 0.02)
    with torch.device("meta"):
        model = Aria(vision, AriaProjectorConfig({4: 1}, 0.02), text, image_token_id=9)
    materialize(model, RandomInit(model, seed=0), DEVICE)
    return model.to(torch.bfloat16).train()


def peer_model(vocab_size: int, ours: Aria) -> nn.Module:
    """transformers' decoder with our weights."""
    config = PeerConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=WIDTH,
        moe_num_experts=EXPERTS,
        moe_topk=TOP_K,
        moe_num_shared_experts=SHARED,
        vocab_size=vocab_size,
        pad_token_id=0,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        use_cache=False,
    )
    model = AriaTextForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.bfloat16
    )
    assert model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours.get_parameter(_our_name(name)))
    return model.to(DEVICE).train()


def _our_name(peer: str) -> str:
    name = peer.replace("lm_head.weight", "head.weight").replace("model.norm.", "head.norm.")
    name = name.replace("model.", "text.", 1) if name.startswith("model.") else name
    return name.replace(".experts.gate_up_proj", ".experts.fc1").replace(".experts.down_proj", ".experts.fc2")


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


def our_step(model: Aria, samples: Sequence[Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
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

    ours = our_model(8192)
    peer = peer_model(8192, ours)
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
    large = our_model(vocab_size)
    samples = full_rows(vocab_size, 4, 512)
    own_bytes = harness.peak_bytes(our_step(large, samples))
    peer_bytes = harness.peak_bytes(peer_step(peer_model(vocab_size, large), samples))
    harness.figure("memory", own_bytes / 2**20, "MiB (ours)")
    harness.figure("memory_peer", peer_bytes / 2**20, "MiB (transformers)")

    harness.ratio("tokens_per_second", speed)
    harness.ratio("tokens_per_second_packed", packing)
    harness.ratio("memory_large_vocabulary", peer_bytes / own_bytes)


if __name__ == "__main__":
    main()
