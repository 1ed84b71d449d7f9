"""A training step on two ranks: experts spread over them (ep 2) against FSDP2 alone (ep 1).

    python benchmarks/expert_parallel.py [--quick]

The command starts both ranks itself. The same small Aria decoder, tokens and optimizer run through the real
engine on both meshes, in turn, in the same processes. Without ep every rank gathers all experts of a layer
and reduce-scatters all their gradients; with it the experts stay, and tokens travel. Memory is what a rank
holds between steps plus the most that a step adds, by the allocator's own account. The communication share
is the part of a step in which a collective is under way on rank 0, waiting for the other rank included.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import harness
import torch
import torch.distributed as dist
from decoders import Shape, our_decoder
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from train_step import packed

from cantata.core.types import Batch, StepTotals
from cantata.nn.moe.balance import BalanceConfig
from cantata.parallel.materialize import RandomInit
from cantata.parallel.mesh import MeshConfig, build_mesh
from cantata.parallel.recompute import Recompute
from cantata.train.fsdp2 import FSDP2Engine
from cantata.train.objectives import NextToken

RANKS = 2
SHAPE = Shape(384, 4, 6, num_experts=32, top_k=4, num_shared_experts=2, expert_size=256, vocab_size=8192)
BALANCE = BalanceConfig(
    aux_loss_coef=1e-3,
    aux_loss_groups=SHAPE.num_experts,
    modality_aux_loss_coef={},
    sequence_aux_loss_coef=0.0,
    z_loss_coef=1e-5,
    bias_update_rate=0.0,
)


def engine_with(ep: int, device: torch.device) -> FSDP2Engine:
    model = our_decoder(SHAPE, BALANCE)
    return FSDP2Engine(
        model=model,
        mesh=build_mesh(MeshConfig(1, -1, ep), RANKS, device.type),
        source=RandomInit(model, 0),
        optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
        parameters={},
        recompute=Recompute.none,
        compile=False,
        device=device,
        precision="bf16",
        state_dtype="fp32",
        offload="none",
    )


def step_of(engine: FSDP2Engine, batch: Batch) -> Callable[[], float]:
    objective = NextToken(BALANCE)
    totals = StepTotals(RANKS * batch.num_tokens, RANKS * batch.num_targets, RANKS * batch.target_weight)

    def step() -> float:
        sums = engine.forward_backward(batch, objective, totals, last=True)
        engine.gradient_norm(1.0)
        engine.step(1.0)
        return sums["loss_sum"].item() / batch.num_targets

    return step


def held_bytes(engine: FSDP2Engine) -> int:
    """Parameters and optimizer state of this rank."""
    tensors: Iterable[Any] = engine.state_dict().values()
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def communication(step: Callable[[], Any]) -> dict[str, float]:
    """Shares of a step's time in which collectives are under way: by kind, and `all` of them together."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as run:
        total = harness.seconds(step)
    spans = defaultdict(list)
    for event in run.events():
        kind = event.name.removeprefix("nccl:").removeprefix("gloo:")
        if kind != event.name:
            spans[kind].append((event.time_range.start, event.time_range.end))
    spans["all"] = [span for group in spans.values() for span in group]
    return {kind: covered(group) / 1e6 / total for kind, group in sorted(spans.items())}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def work(rank: int, port: int, quick: bool) -> None:
    """What each rank does; rank 0 prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_gpu = torch.cuda.device_count() >= RANKS
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=RANKS)
    lengths = (1, 256) if quick else (2, 512)
    ids = torch.randint(16, SHAPE.vocab_size, lengths, generator=torch.Generator().manual_seed(rank))
    batch = packed(list(ids)).to(device)
    spread, whole = engine_with(RANKS, device), engine_with(1, device)
    ours, other = step_of(spread, batch), step_of(whole, batch)
    first = ours(), other()
    seconds, whole_seconds, speed = harness.alternate(ours, other, pairs=3 if quick else 9)
    own_bytes = held_bytes(spread) + harness.peak_bytes(ours)
    whole_bytes = held_bytes(whole) + harness.peak_bytes(other)
    shares, whole_shares = communication(ours), communication(other)
    if rank == 0:
        print(harness.environment(), f"{RANKS} ranks")
        print(f"loss of the first step: ep 2 {first[0]:.5f}, fsdp2 {first[1]:.5f}")
        for name, parts in (("ep 2", shares), ("fsdp2", whole_shares)):
            listed = ", ".join(f"{kind} {share:.1%}" for kind, share in parts.items())
            print(f"collectives under way, share of the step, {name}: {listed}")
        harness.figure("step_seconds_ep2", seconds, "s")
        harness.figure("step_seconds_fsdp2", whole_seconds, "s")
        harness.figure("memory_ep2", own_bytes / 2**20, "MiB a rank")
        harness.figure("memory_fsdp2", whole_bytes / 2**20, "MiB a rank")
        harness.figure("communication_share_ep2", shares["all"], "of the step")
        harness.figure("communication_share_fsdp2", whole_shares["all"], "of the step")
        harness.ratio("step_seconds_ep2_against_fsdp2", speed)
        harness.ratio("memory_ep2_against_fsdp2", whole_bytes / own_bytes)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs, shorter rows")
    quick = parser.parse_args().quick
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One thread a rank: two ranks with a thread for every core each would take the cores from each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(work, (port, quick), nprocs=RANKS)


if __name__ == "__main__":
    main()
