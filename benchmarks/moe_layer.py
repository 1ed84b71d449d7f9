"""Forward and backward of one Aria-shaped MoE layer: ours against transformers' and torchtitan's.

    python benchmarks/moe_layer.py [--quick] [--processor-time]

All hold the same weights and see the same tokens, in one process, in turn. Routing is real (a random router
on tokens whose directions differ in frequency, as words do: some experts are busy, some nearly idle) and
balanced (each token leans towards six experts, so that every expert gets the same share). Ours is held
against each implementation that the peers offer and this machine can run; a ratio is against the best one.
On CUDA the shape is Aria's own (hidden 2560, 64 experts of 1664, 16,384 tokens).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import harness
import moe_peers
import torch
from moe_peers import Layer, Shape
from torch import Tensor

from cantata.core.types import TEXT, TokenGroups
from cantata.nn.mlp import SwiGLU
from cantata.nn.moe.experts import Experts
from cantata.nn.moe.layer import MoELayer
from cantata.nn.moe.router import TopKRouter
from cantata.train.flops import peak_flops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS, TOP_K, SHARED = 64, 6, 2
ARIA = Shape(2560, 1664, EXPERTS, TOP_K, SHARED)
SCALED = Shape(512, 256, EXPERTS, TOP_K, SHARED)


class Problem(NamedTuple):
    """The tokens of one layer and the gradient that comes back to it."""

    x_TD: Tensor
    grad_TD: Tensor


def our_layer(shape: Shape, dtype: torch.dtype) -> MoELayer:
    router = TopKRouter(
        shape.hidden,
        shape.experts,
        shape.top_k,
        num_groups=1,
        top_groups=1,
        use_expert_bias=False,
        sequence_stats=False,
    )
    experts = Experts(shape.experts, shape.hidden, shape.width)
    layer = MoELayer(router, experts, SwiGLU(shape.hidden, shape.shared * shape.width))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return layer.to(DEVICE, dtype)


def text(tokens: int) -> TokenGroups:
    modality_T = torch.full((tokens,), TEXT, device=DEVICE)
    return TokenGroups(modality_T, torch.zeros_like(modality_T), 1)


def real_tokens(layer: MoELayer, shape: Shape, tokens: int) -> Problem:
    """Normalised mixtures of a few hundred directions, drawn as words are: the r-th with weight 1 / r."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(400, shape.hidden, generator=generator)
    weights = 1 / torch.arange(1, 401)
    words_T = torch.multinomial(weights, tokens, replacement=True, generator=generator)
    x_TD = directions[words_T] + torch.randn(tokens, shape.hidden, generator=generator)
    return _problem(x_TD, layer.router.weight.dtype)


def balanced_tokens(layer: MoELayer, shape: Shape, tokens: int) -> Problem:
    """Token t leans towards experts t k, ... t k + k - 1 (modulo their number), so far that it goes there."""
    generator = torch.Generator().manual_seed(1)
    chosen_TK = torch.arange(tokens * shape.top_k).view(tokens, shape.top_k) % shape.experts
    # The pseudo-inverse turns wanted logits into tokens.
    towards_ED = torch.linalg.pinv(layer.router.weight.detach().float().cpu()).t()
    strength_TK1 = 2 + 0.1 * torch.arange(shape.top_k)[None, :, None]
    lean_TD = (towards_ED[chosen_TK] * strength_TK1).sum(1)
    noise_TD = torch.randn(tokens, shape.hidden, generator=generator)
    return _problem(3 * lean_TD / lean_TD.std() + noise_TD, layer.router.weight.dtype)


def _problem(x_TD: Tensor, dtype: torch.dtype) -> Problem:
    x_TD = x_TD / x_TD.square().mean(-1, keepdim=True).sqrt()
    grad_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(2))
    return Problem(x_TD.to(DEVICE, dtype).requires_grad_(), grad_TD.to(DEVICE, dtype))


def step_of(layer: Layer, problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward; returns the output and the tokens' gradient, and leaves no gradient behind."""

    def step() -> tuple[Tensor, Tensor]:
        y_TD = layer.run(problem.x_TD)
        y_TD.backward(problem.grad_TD)
        grad_TD, problem.x_TD.grad = problem.x_TD.grad, None
        layer.module.zero_grad()
        return y_TD.detach(), grad_TD

    return step


def difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """Relative distances; in bf16 a rounded logit may send a token elsewhere, which the median leaves out."""
    parts = []
    for what, a, b in zip(("output", "gradient"), found, expected, strict=True):
        row_T = (a - b).float().norm(dim=-1) / b.float().norm(dim=-1)
        parts.append(f"{what} {row_T.median():.1e} (median token), {row_T.mean():.1e} (mean)")
    return "differs from ours by " + ", ".join(parts)


def compare(
    shape: Shape, tokens: int, dtype: torch.dtype, routing: str, pairs: int, clock: harness.Clock
) -> dict[str, float]:
    """One dtype and one routing against every peer: prints what it finds, returns the ratios."""
    layer = our_layer(shape, dtype)
    make = real_tokens if routing == "real" else balanced_tokens
    problem = make(layer, shape, tokens)
    suffix = f"{str(dtype).removeprefix('torch.').replace('float', 'fp').replace('bfp', 'bf')}_{routing}"
    groups = text(tokens)
    mine = Layer("ours", layer, lambda x_TD: layer(x_TD, groups)[0])
    counts_E = layer(problem.x_TD, groups)[1].tokens_per_expert_ME.sum(0).float()
    busiest, idlest = counts_E.max() / counts_E.mean(), counts_E.min() / counts_E.mean()
    print(f"\n{suffix}: {tokens} tokens; load of the experts {idlest:.2f} to {busiest:.2f} times the mean")
    step = step_of(mine, problem)
    expected = step()
    own_bytes = harness.peak_bytes(step)
    own_times, speeds, memories = [], [], []
    for peer in moe_peers.peers(layer, shape, tokens):
        other = step_of(peer, problem)
        print(f"  {peer.name}: {difference(other(), expected)}")
        # A peer far behind is not worth many pairs.
        slow = harness.seconds(other) > 4 * harness.seconds(step)
        own, theirs, speed = harness.alternate(
            step, other, 1 if slow else pairs, warmup=0 if slow else 2, clock=clock
        )
        peer_bytes = harness.peak_bytes(other)
        print(f"    {tokens / own:.0f} tokens/s ours, {tokens / theirs:.0f} theirs: {speed:.3f}; ", end="")
        print(
            f"{own_bytes / 2**20:.0f} MiB ours, {peer_bytes / 2**20:.0f} theirs: {peer_bytes / own_bytes:.3f}"
        )
        own_times.append(own)
        speeds.append(speed)
        memories.append(peer_bytes / own_bytes)
    seconds = statistics.median(own_times)
    harness.figure(f"tokens_per_second_{suffix}", tokens / seconds, "tokens/s (ours)")
    achieved = operations(shape, tokens) / seconds
    harness.figure(f"teraflops_{suffix}", achieved / 1e12, "TFLOP/s (ours)")
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    if peak is not None and dtype == torch.bfloat16:
        harness.figure(f"peak_share_{suffix}", achieved / peak, "of the device's peak (ours)")
    return {f"tokens_per_second_{suffix}": min(speeds), f"memory_{suffix}": min(memories)}


def operations(shape: Shape, tokens: int) -> float:
    """Multiplications and additions of forward and backward, matrix products only."""
    visited = 3 * shape.hidden * shape.width * (shape.top_k + shape.shared) + shape.hidden * shape.experts
    return 6.0 * tokens * visited


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs and tokens")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's seconds, not the wall's: for a CPU that others use too, with one thread",
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    clock = time.process_time if arguments.processor_time else time.perf_counter
    on_gpu = DEVICE.type == "cuda"
    shape = ARIA if on_gpu else SCALED
    tokens = 16384 if on_gpu else 1024 if quick else 4096
    print(harness.environment())
    print(f"hidden {shape.hidden}, {EXPERTS} experts of {shape.width}, top {TOP_K}, {SHARED} shared")
    ratios = {}
    for dtype in (torch.bfloat16, torch.float32):
        for routing in ("real", "balanced"):
            ratios |= compare(shape, tokens, dtype, routing, 3 if quick else 7, clock)
    print()
    for name, value in ratios.items():
        harness.ratio(name, value)


if __name__ == "__main__":
    main()
