"""What a run runs on: versions, devices and hosts of its ranks, and the state of the source code."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cantata
from cantata.core import dist
from cantata.train.flops import device_name

LIBRARIES = ("torch", "numpy", "deepspeed", "accelerate", "transformers", "datasets", "bitsandbytes", "wandb")
"""Told where the run has imported them."""
PREFIXES = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "TORCH_", "PYTORCH_", "SLURM_JOB_", "SLURM_RESTART_")
"""Variables that change what a run does or say where it ran; others may hold what is nobody's business."""
GIT_SECONDS = 5


def environment() -> dict[str, Any]:
    """Plain values for a JSON line. A collective: every rank names its device."""
    devices = Counter(dist.gather_strings(f"{device_name(dist.device())} on {socket.gethostname()}"))
    return {
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": dist.world_size(),
        "devices": dict(devices),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(Path(cantata.__file__).parent),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    }


def versions() -> dict[str, str]:
    """Of Python, Cantata, the libraries that are in use, and CUDA."""
    found = {"python": platform.python_version(), "cantata": cantata.__version__}
    for name in LIBRARIES:
        if name in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    found["torch"] = torch.__version__  # with its build, which the package's version may lack
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def commit(folder: Path) -> str | None:
    """The git commit that `folder` is at, `+` after it where files were changed; None outside of git."""
    told = _git(folder, "rev-parse", "--short=12", "HEAD")
    if told is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return told + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
