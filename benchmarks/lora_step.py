"""A training step with LoRA on all linear layers, experts and head: ours against transformers with peft.

    python benchmarks/lora_step.py [--quick]

Both adapt the same frozen decoder in bf16, 64 experts of which a token visits 6, with adapters of rank 8 in
fp32; peft names the experts by `target_parameters`. Dropout is 0, which is all that peft can do there. Tokens
per second of whole steps with fused AdamW, and the most memory that a step adds.
"""

from __future__ import annotations

import argparse

import harness
from decoders import Shape, filled, our_decoder, peer_decoder
from peft import LoraConfig, get_peft_model
from torch import nn
from train_step import full_rows, our_step, peer_step

from cantata.models.aria import Aria
from cantata.models.lora import LoRAConfig, apply_lora
from cantata.nn.lora import Packing, is_factor

SHAPE = Shape(384, 4, 6, num_experts=64, top_k=6, num_shared_experts=2, expert_size=256, vocab_size=8192)
R, ALPHA = 8, 32


def ours() -> Aria:
    """Our decoder with adapters, those in fp32 as its engine would keep them."""
    model = our_decoder(SHAPE, SHAPE.unbalanced)
    targets = ["text.layers.*", "head"]
    apply_lora(model, LoRAConfig(R, ALPHA, 0.0, False, False, targets, {}, [], None, Packing.none))
    model = filled(model)
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter.data = parameter.data.float()
    return model


def peers(model: Aria) -> nn.Module:
    """transformers' decoder with the same frozen weights, adapted by peft."""
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=r".*(?:_proj|lm_head)",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(peer_decoder(SHAPE, model), config).train()


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pairs, a quarter of the tokens")
    quick = parser.parse_args().quick
    print(harness.environment())

    mine = ours()
    other = peers(mine)
    assert trained(mine) == trained(other), "both must train as much"
    samples = full_rows(SHAPE.vocab_size, 1 if quick else 4, 512)
    tokens = sum(map(len, samples))
    own_step, peers_step = our_step(mine, samples), peer_step(other, samples)
    print(f"loss of the first step: ours {own_step():.5f}, transformers with peft {peers_step():.5f}")
    own, theirs, speed = harness.alternate(own_step, peers_step, 3 if quick else 7)
    own_bytes, peer_bytes = harness.peak_bytes(own_step), harness.peak_bytes(peers_step)
    harness.figure("tokens_per_second", tokens / own, "tokens/s (ours)")
    harness.figure("tokens_per_second_peer", tokens / theirs, "tokens/s (transformers with peft)")
    harness.figure("memory", own_bytes / 2**20, "MiB (ours)")
    harness.figure("memory_peer", peer_bytes / 2**20, "MiB (transformers with peft)")
    harness.ratio("tokens_per_second", speed)
    harness.ratio("memory", peer_bytes / own_bytes)


if __name__ == "__main__":
    main()
