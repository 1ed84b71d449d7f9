"""Runs us and a peer in turn in one process, and prints ratios.

Each figure is the median over pairs: the two run one after the other, so a machine whose speed drifts slows
both. Ratios are turned so that above 1 is better for us.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]
Clock = Callable[[], float]


def seconds(step: Step, clock: Clock = time.perf_counter) -> float:
    """Time of one call, device work included."""
    _synchronize()
    start = clock()
    step()
    _synchronize()
    return clock() - start


def alternate(
    ours: Step, peer: Step, pairs: int, warmup: int = 2, clock: Clock = time.perf_counter
) -> tuple[float, float, float]:
    """Median seconds of ours and of the peer, and the median over pairs of peer / ours."""
    for _ in range(warmup):
        ours()
        peer()
    times = [(seconds(ours, clock), seconds(peer, clock)) for _ in range(pairs)]
    mine, other = zip(*times, strict=True)
    ratios = [theirs / own for own, theirs in times]
    return statistics.median(mine), statistics.median(other), statistics.median(ratios)


def peak_bytes(step: Step) -> int:
    """Most bytes that one call holds at a time, above what was held before it.

    On CUDA the allocator keeps this figure. On CPU the profiler's allocation events are added up.
    """
    if torch.cuda.is_available():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def figure(name: str, value: float, unit: str) -> None:
    print(f"figure {name} {value:.4g} {unit}")


def ratio(name: str, value: float) -> None:
    print(f"ratio {name} {value:.3f}")


def environment() -> str:
    """Hardware and versions, for the record beside the figures."""
    import transformers

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
