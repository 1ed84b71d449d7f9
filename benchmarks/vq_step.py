"""A training step of Emu3's image tokenizer: ours against transformers' modules, in one process, in turn.

    python benchmarks/vq_step.py [--quick]

Both hold the same weights in fp32 and use fused AdamW; the loss is the squared error of the pixels, plus the
codebook's and the commitment. transformers' quantiser gives codes only, so the straight-through gradient and
the losses are put around its encoder and decoder. Four questions: images per second of a step, frames per
second of a step on clips, peak memory of a step, and peak memory of the search for the nearest codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import harness
import torch
from torch import Tensor, nn
from train_step import adamw
from transformers import Emu3VQVAE as Peer
from transformers import Emu3VQVAEConfig as PeerConfig

from cantata.models.emu3.vqvae import Emu3VQVAE, Emu3VQVAEConfig
from cantata.nn.quantize import VectorQuantizer
from cantata.parallel.materialize import RandomInit, materialize, persistent_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Emu3VQVAEConfig(
    base_channels=32,
    channel_multipliers=(1, 2, 2, 4),
    num_res_blocks=2,
    attention_levels=(3,),
    z_channels=4,
    temporal_factor=4,
)
CODES, COMMITMENT = 32768, 0.25


def our_model() -> Emu3VQVAE:
    with torch.device("meta"):
        model = Emu3VQVAE(SHAPE, VectorQuantizer(CODES, 4, COMMITMENT, False, "straight_through"))
    materialize(model, RandomInit(model, seed=0), DEVICE)
    return model.train()


def peer_model(ours: Emu3VQVAE) -> Peer:
    """transformers' tokenizer with our weights."""
    layout = ours.hub_layout()
    peer = Peer(PeerConfig(**layout.hub_config())).to(DEVICE)
    values = {
        layout.to_hub(name): tensor.reshape(layout.hub_shape(name, tensor.shape))
        for name, tensor in persistent_tensors(ours)
    }
    peer.load_state_dict(values)
    return peer.train()


def our_step(model: Emu3VQVAE, pixels_BTCHW: Tensor) -> Callable[[], float]:
    optimizer = adamw(model)

    def step() -> float:
        output = model(pixels_BTCHW)
        error = (output.reconstruction_BTCHW - pixels_BTCHW).square().mean()
        return learned(error + output.quantized.loss_sum / output.quantized.indices_N.numel(), optimizer)

    return step


def peer_step(peer: Peer, pixels_BTCHW: Tensor) -> Callable[[], float]:
    """An image is repeated to a clip, as its `encode` does; of the decoded clip the first frame counts."""
    optimizer = adamw(peer)
    is_image = pixels_BTCHW.shape[1] == 1

    def step() -> float:
        frames = pixels_BTCHW.repeat(1, SHAPE.temporal_factor, 1, 1, 1) if is_image else pixels_BTCHW
        z = swapped(peer.quant_conv(swapped(peer.encoder(frames))))
        with torch.no_grad():
            codes = peer.quantize(z)
        chosen = peer.quantize.embedding(codes).permute(0, 1, 4, 2, 3)
        loss = nn.functional.mse_loss(chosen, z.detach())
        loss = loss + COMMITMENT * nn.functional.mse_loss(z, chosen.detach())
        values = z + (chosen - z).detach()
        decoded = peer.decoder(swapped(peer.post_quant_conv(swapped(values))), values)
        decoded = decoded.reshape(frames.shape)[:, : pixels_BTCHW.shape[1]]
        return learned((decoded - pixels_BTCHW).square().mean() + loss, optimizer)

    return step


def swapped(x: Tensor) -> Tensor:
    """Frames and channels the other way round."""
    return x.transpose(1, 2)


def learned(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def search_memory(ours: Emu3VQVAE, peer: Peer, rows: int) -> tuple[int, int]:
    """Peak bytes of finding the codes of so many rows."""
    z_ND = torch.randn(rows, 4, device=DEVICE)
    z_BtDhw = z_ND.t().reshape(1, 1, 4, rows // 64, 64)
    with torch.no_grad():
        return harness.peak_bytes(lambda: ours.quantizer(z_ND)), harness.peak_bytes(
            lambda: peer.quantize(z_BtDhw)
        )


def compare(pixels_BTCHW: Tensor, pairs: int, unit: str) -> tuple[float, float]:
    """Ratios of speed and of peak memory of a step."""
    ours = our_model()
    peer = peer_model(ours)
    mine, other = our_step(ours, pixels_BTCHW), peer_step(peer, pixels_BTCHW)
    print(f"loss of the first step on {unit}: ours {mine():.6f}, transformers {other():.6f}")
    own, theirs, speed = harness.alternate(mine, other, pairs)
    count = pixels_BTCHW.shape[:2].numel()
    harness.figure(f"{unit}_per_second", count / own, f"{unit}/s (ours)")
    harness.figure(f"{unit}_per_second_peer", count / theirs, f"{unit}/s (transformers)")
    return speed, harness.peak_bytes(other) / harness.peak_bytes(mine)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs, fewer and smaller images")
    quick = parser.parse_args().quick
    pairs, side, batch, rows = (2, 32, 4, 1024) if quick else (5, 64, 4, 4096)
    print(harness.environment())
    torch.manual_seed(0)
    images, images_memory = compare(
        torch.rand(batch, 1, 3, side, side, device=DEVICE) * 2 - 1, pairs, "images"
    )
    frames, _ = compare(torch.rand(1, 8, 3, side, side, device=DEVICE) * 2 - 1, pairs, "frames")
    ours = our_model()
    own_bytes, peer_bytes = search_memory(ours, peer_model(ours), rows)
    harness.figure("memory_search", own_bytes / 2**20, "MiB (ours)")
    harness.figure("memory_search_peer", peer_bytes / 2**20, "MiB (transformers)")

    harness.ratio("images_per_second", images)
    harness.ratio("frames_per_second_clips", frames)
    harness.ratio("memory_step", images_memory)
    harness.ratio("memory_search", peer_bytes / own_bytes)


if __name__ == "__main__":
    main()
